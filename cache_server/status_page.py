"""The status page: one self-contained HTML file, completed once at the start with what only the server knows.

Its policy lets the browser use this script and this style, by their hashes, and ask this server.
"""

import base64
import re
from hashlib import sha256
from pathlib import Path

import msgspec

from cache_server.answers import OK, Answer
from cache_server.config import Config
from cache_server.counters import BUCKETS_US
from cache_server.trials import STAGES

PATH = "/"
FILE = Path(__file__).with_name("page.html")
HTML = "text/html; charset=utf-8"


def status_page(config: Config) -> Answer:
    """Its addresses are relative, so that it also works under a proxy's prefix."""
    given = {
        "health": config.health_path.lstrip("/"),
        "events": config.events_path.lstrip("/"),
        "status": "status",
        "buckets_us": BUCKETS_US,
        "stages": STAGES,
    }
    page = FILE.read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash(page, 'script')}; style-src {_hash(page, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    )
    page = page.replace("$given", msgspec.json.encode(given).decode()).replace(
        "$health_path", config.health_path
    )
    headers = (
        f"Content-Security-Policy: {policy}",
        "X-Content-Type-Options: nosniff",
        "Referrer-Policy: no-referrer",
    )
    return Answer(OK, HTML, page.encode(), headers)


def _hash(page: str, element: str) -> str:
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"
