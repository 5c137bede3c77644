"""The status page: what it reads is there, it needs nobody else, and a real Chromium shows what is true."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_server.beats import Motion
from cache_server.health import Code, State
from cache_server.session import Session
from cache_server.status_page import FILE
from cache_server.trials import Result
from cache_server.workers import WorkerState
from health.browser import Browser, browser
from health.probed import Probed, probed
from health.world import failed, world_of
from processes import eventually, short_dir

ROOT = Path(__file__).parents[2]
SOURCE = FILE.read_text("utf-8")
FIELDS = json.loads(re.findall(r'id="fields">(.*?)</script>', SOURCE, re.DOTALL)[0])
SCRIPT = re.findall(r"<script>(.*?)</script>", SOURCE, re.DOTALL)[0]
DESKTOP, PHONE = (1200, 1000), (360, 800)
SEEN_S = 60.0
CHUNK = 4096
TOO_WIDE = (
    "[...document.querySelectorAll('main *')].filter(each => !each.closest('thead') && each.clientWidth"
    " && each.scrollWidth > each.clientWidth + 1).map(each => each.id || each.outerHTML)"
)
HASH = b"h" * 32
CUSTOM = ("--health-path", "/z/health", "--events-path", "/z/changes", "--live-path", "/z/live")


def keys_of(name: str) -> list[str]:
    """The keys of an object that is written as a constant of the script."""
    body = re.findall(rf"const {name} = {{\n(.*?)\n}};", SCRIPT, re.DOTALL)[0]
    return [quoted or plain for quoted, plain in re.findall(r'(?:"([\w ]+)"|\b(\w+)): [\["]', body)]


def fetch(server: Probed, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(server.address, timeout=20)
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def answers(server: Probed) -> bool:
    try:
        return fetch(server, "/")[0].status == 200
    except OSError:
        return False


def said_by(server: Probed) -> dict[str, dict]:
    """One real object of each kind that the page reads."""
    health, status = server.get("/health")[1], server.get("/status")[1]
    history = server.get("/health/events")[1]
    return {
        "health": health,
        **{kind: health[kind][0] for kind in ("components", "engines", "workers", "tiers")},
        "canary": health["canary"],
        "last": health["canary"]["last"],
        "history": history,
        "events": history["events"][0],
        "status": status,
        **{kind: status[kind] for kind in ("arena", "chunks", "counters")},
        "latency": status["latency"]["ping"],
    }


def test_every_field_that_the_page_reads_is_in_the_real_answers() -> None:
    with probed("--canary-idle", "3s", "--canary-deadline", "1s") as server:
        session = Session(server.process.runtime_dir, "engine", CHUNK)
        session.ping()
        eventually(lambda: server.get("/health")[1]["canary"]["last"], "a run of the canary", SEEN_S)
        eventually(lambda: server.get("/health")[1]["engines"], "a row", SEEN_S)
        eventually(lambda: "ping" in server.get("/status")[1]["latency"], "the ping's latency", SEEN_S)
        said = said_by(server)
        session.close()
    with world_of(canary_idle="1s", canary_deadline="500ms") as world:
        world.started()
        world.canary.outcome = failed()
        world.run(10_000)
        with world.pulses["loop"].busy("long", 1_000, lambda: world.now_ms):
            health = world.get("/health")[1]
        said |= {"findings": health["findings"][0], "leases": health["components"][0]["leases"][0]}
    assert set(said) == set(FIELDS)
    for kind, names in FIELDS.items():
        assert set(names) <= set(said[kind]), kind


def test_the_page_knows_every_state_and_code() -> None:
    codes = {value for name, value in vars(Code).items() if name.isupper()}
    assert set(keys_of("ADVICE")) == codes | {"unanswered"}
    states = {each.value for kind in (State, WorkerState, Motion, Result) for each in kind}
    assert states - {Result.OK.value} <= set(keys_of("LOOKS"))


def test_it_is_one_page_that_needs_nobody_else() -> None:
    with probed() as server:
        answer, body = fetch(server, "/")
        head, nothing = fetch(server, "/", "HEAD")
    page = body.decode()
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert answer.getheader("Cache-Control") == "no-store"
    assert (head.getheader("Content-Length"), nothing) == (str(len(body)), b"")
    policy = dict(part.split(" ", 1) for part in str(answer.getheader("Content-Security-Policy")).split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind]), policy
    elsewhere = r'https?:|["\'(]//|@import|url\(|\bsrc=|<(?:iframe|img|object|embed)'
    assert re.findall(elsewhere, page) == []
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page) == []
    assert "$given" not in page
    assert "$health_path" not in page


def test_it_is_told_the_paths_of_this_server() -> None:
    with probed(*CUSTOM) as server:
        page = fetch(server, "/")[1].decode()
        given = json.loads(re.findall(r'id="given">(.*?)</script>', page, re.DOTALL)[0])
        assert (given["health"], given["events"]) == ("z/health", "z/changes")
        for kind in ("health", "events", "status"):
            assert server.get(f"/{given[kind]}")[0] == 200


def test_a_build_takes_it_along(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="nothing to build with")
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet"]
    build = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([*command, *build], cwd=ROOT, capture_output=True, timeout=120, check=True)
    assert (tmp_path / "cache_server" / "page.html").read_text("utf-8") == SOURCE


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as window:
        yield window


def shows(window: Browser, element: str, words: str) -> str:
    """What stands there, as soon as it is that."""
    seen: list[str] = []

    def there() -> bool:
        seen[:] = [window.text(element)]
        return words in seen[0]

    try:
        eventually(there, f"{words!r} in #{element}", SEEN_S)
    except AssertionError as error:
        raise AssertionError(f"{error}; last seen: {seen}; {window.messages}") from None
    return seen[0]


def test_the_page_shows_what_becomes_of_the_server(window: Browser) -> None:
    with probed(*CUSTOM, "--late-after", "1s") as server:
        window.window(*DESKTOP)
        window.open(f"http://{server.address}/")
        assert shows(window, "state", "ready") == "✓ready"
        assert "live, ready for traffic" in window.text("since")
        shows(window, "canary", "ok")
        assert window.value("document.getElementById('now').className") == "wide good"

        server.tell("pause")
        shows(window, "state", "paused")
        assert "resume" in window.text("todo")
        assert "paused" in window.text("events")

        os.kill(server.process.pid, signal.SIGSTOP)
        shows(window, "state", "no answer")
        assert "paused; all below is as old" in window.text("since")
        assert "no answer within" in window.text("why")
        os.kill(server.process.pid, signal.SIGCONT)
        shows(window, "state", "paused")

        server.tell("resume")
        shows(window, "state", "ready")
        server.fault("loop", "8")
        shows(window, "state", "failing")
        assert "late: loop" in window.text("why")
        shows(window, "outdated", "The main loop has not moved for")
        shows(window, "state", "ready")

        server.process.kill()
        shows(window, "state", "no answer")
        assert "Failed to fetch" in window.text("why")
    assert window.messages == []


def test_the_page_is_there_during_the_start_and_shows_where_the_canary_fails(window: Browser) -> None:
    with short_dir() as directory:
        (directory / "fault.start").write_text("10")
        options = ("--canary-idle", "2s", "--canary-deadline", "1s", "--canary-fail-after", "5")
        with probed(*options, directory=directory, wait=False) as server:
            eventually(lambda: answers(server), "the page", SEEN_S)
            window.window(*DESKTOP)
            window.open(f"http://{server.address}/")
            shows(window, "state", "starting")
            assert "not ready for traffic" in window.text("since")
            shows(window, "state", "ready")
            server.fault("canary_job", "die")
            shows(window, "canary-why", "failed at connect")
            assert window.text("stages").startswith("✕connect")
            shows(window, "canary", "ok")
    assert window.messages == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_lies_outside_the_window(window: Browser, scheme: str) -> None:
    with probed() as server:
        names = ["<img src=x onerror=alert(1)>", "n" * 100]
        sessions = [Session(server.process.runtime_dir, name, CHUNK) for name in names]
        sessions[0].store([HASH], [b"x" * CHUNK])
        window.window(*PHONE, scheme)
        window.open(f"http://{server.address}/")
        for name in names:
            shows(window, "endpoints", name)
        assert window.value("document.documentElement.scrollWidth") == PHONE[0]
        assert window.value(TOO_WIDE) == []
        dark = window.value("getComputedStyle(document.body).backgroundColor")
        assert dark == {"light": "rgb(246, 247, 248)", "dark": "rgb(15, 19, 24)"}[scheme]
        for session in sessions:
            session.close()
    assert window.messages == []


def test_whoever_does_not_see_it_hears_it(window: Browser) -> None:
    """Landmarks, headers and roles as a screen reader gets them."""
    with probed() as server:
        window.window(*PHONE)
        window.open(f"http://{server.address}/")
        shows(window, "state", "ready")
        tree = window.call("Accessibility.getFullAXTree")["nodes"]
        roles = [node["role"]["value"] for node in tree if not node["ignored"]]
        named = {
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in tree
            if not node["ignored"]
        }
        assert {"main", "banner", "contentinfo", "status"} <= set(roles)
        assert {("region", "state"), ("region", "Timeline"), ("region", "Engines, workers, tiers")} <= named
        assert {("columnheader", "state"), ("rowheader", "tier memory")} <= named
        assert any(role == "image" and name.startswith("the last ") for role, name in named), named
        assert window.value("document.getElementById('state').getAttribute('aria-live')") == "polite"
    assert window.messages == []
