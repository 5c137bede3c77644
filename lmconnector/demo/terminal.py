"""What the user sees while the demo runs: colours and a living line on a terminal, plain lines elsewhere."""

import os
import shlex
import shutil
import textwrap
import time
from typing import TextIO

BOLD, DIM, RED, GREEN, YELLOW, BLUE = "1", "2", "31", "32", "33", "34"
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_INTERVAL_S = 10.0  # between two lines about the same wait
WIDTH_MAX = 100
INDENT = " " * 6


class Terminal:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lively = out.isatty() and os.environ.get("TERM") != "dumb"
        self._coloured = self._lively and not os.environ.get("NO_COLOR")
        self._block = "█" if (out.encoding or "utf-8").lower().startswith("utf") else "#"
        self._width = min(WIDTH_MAX, shutil.get_terminal_size().columns)
        self._frame = 0
        self._told_s = 0.0

    def line(self, text: str = "", style: str = "") -> None:
        self._clear()
        print(self.styled(text, style), file=self._out, flush=True)

    def item(self, head: str, text: str, style: str = "") -> None:
        """The head once, and the text beside it."""
        for number, line in enumerate(textwrap.wrap(text, self._width - len(head), break_on_hyphens=False)):
            self.line((" " * len(head) if number else head) + self.styled(line, style))

    def paragraph(self, text: str) -> None:
        self.item(INDENT, text, DIM)

    def command(self, words: list[str], indent: str = INDENT) -> None:
        self.item(indent, f"$ {shlex.join(words)}", DIM)

    def styled(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if style and self._coloured else text

    def bar(self, length: int, style: str) -> str:
        return self.styled(self._block * length, style)

    def living(self, began_s: float, text: str) -> None:
        """Call it again and again while something takes its time."""
        now_s = time.monotonic()
        if self._lively:
            self._frame = (self._frame + 1) % len(FRAMES)
            shown = f"{INDENT}{FRAMES[self._frame]} {now_s - began_s:.0f} s  {text}"[: self._width - 1]
            print(f"\r\x1b[2K{self.styled(shown, DIM)}", end="", file=self._out, flush=True)
        elif now_s - max(began_s, self._told_s) >= PLAIN_INTERVAL_S:
            self._told_s = now_s
            print(f"{INDENT}{now_s - began_s:.0f} s  {text}"[:WIDTH_MAX], file=self._out, flush=True)

    def _clear(self) -> None:
        if self._lively:
            print("\r\x1b[2K", end="", file=self._out)
