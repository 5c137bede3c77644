"""The words of a picture: its colours, light and dark, and its simplest shapes.  Pure."""

from html import escape

STYLE = """\
text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px }
.card { fill: #ffffff; stroke: #d0d7de } .ink { fill: #1f2328 } .faint { fill: #59636e }
.title { font-size: 18px; font-weight: 600 } .small { font-size: 12px } .end { text-anchor: end }
.middle { text-anchor: middle } .grid { stroke: #d0d7de; stroke-width: 1 }
.mark { stroke: #59636e; stroke-width: 1.2; stroke-dasharray: 4 3 } .on { fill: #ffffff }
.computed { fill: #d97706 } .hit { fill: #2f6fdf } .failed { fill: #cf222e } .empty { fill: #eaeef2 }
.healthy { fill: #2da44e } .recovering { fill: #8250df } .suspect { fill: #bf8700 } .dormant { fill: #8c959f }
.degraded { fill: #cf222e } .stopped { fill: #57606a }
@media (prefers-color-scheme: dark) {
.card { fill: #0d1117; stroke: #3d444d } .ink { fill: #f0f6fc } .faint { fill: #9198a1 }
.grid { stroke: #3d444d } .mark { stroke: #9198a1 } .empty { fill: #262c36 }
}"""


def text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def tip(words: str) -> str:
    return f"<title>{escape(words)}</title>"
