"""Replays each transcript through `Health` and compares what it says; PYTEST_REWRITE=1 accepts the new text.

A line is a time in ms, an input and its arguments; below it, indented, stands what came of it, after its own
time where that is an earlier one.  Between the lines time passes as in the heartbeat's loop: ticks when they
are due, pings sent at once.  `stalled`, before an input, says that our own process has done nothing since the
line before.  `answers` says what becomes of the pings from then on: `answers 7` a pong of boot 7 after 1 ms;
`unknown`, `draining` or `after 600` (ms) may follow; `answers nothing` is how it begins.
"""

import heapq
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmconnector.health import Change, Health, Ping, Pong, State, Timing

FOLDER = Path(__file__).parent
INDENT = "    "
PINGS_SHOWN_MAX = 4  # one after the other; more become one line


class Stage:
    def __init__(self) -> None:
        self.health = Health(Timing(), self._on_change)
        self._now_ms = 0
        self._said: list[tuple[int, str]] = []
        self._pongs: list[tuple[int, Pong]] = []  # under way: (arrival, pong)
        self._answers: list[str] = ["nothing"]

    def replay(self, text: str) -> Iterator[str]:
        for line in text.splitlines():
            if line.startswith("#") or not line:
                yield line
            elif not line.startswith(INDENT):
                at, verb, *arguments = line.split()
                self._play(int(at), verb, arguments)
                yield line
                yield from self._take_said()

    def _play(self, now_ms: int, verb: str, arguments: list[str]) -> None:
        if verb == "stalled":
            verb, *arguments = arguments
        elif self.health.state is not State.DORMANT:
            self._let_pass(now_ms)
        self._now_ms = now_ms
        health = self.health
        plain = {
            "start": health.start,
            "disappointed": health.on_disappointment,
            "success": health.on_success,
            "forgotten": health.on_forgotten,
            "connected": health.on_connected,
            "disconnected": health.on_disconnected,
        }
        match verb, arguments:
            case "tick", []:
                pass
            case "answers", [_, *_]:
                self._answers = arguments
            case "pong", [seq, boot, *flags]:
                self._hear(pong_of(int(seq), int(boot), flags))
            case "recovered", [attempt, boot] if boot.isdecimal():
                health.on_recovered(int(attempt), int(boot), "", now_ms)
            case "recovered", [attempt, *why_not]:
                health.on_recovered(int(attempt), 0, " ".join(why_not), now_ms)
            case "stop", []:
                health.stop("shutdown", now_ms)
            case _, [] if verb in plain:
                plain[verb](now_ms)
            case _:
                raise ValueError(f"{now_ms} {verb} {arguments}")
        self._tick()

    def _let_pass(self, until_ms: int) -> None:
        while self.health.state is not State.STOPPED:
            heard = bool(self._pongs) and self._pongs[0][0] <= self.health.wake_at_ms
            next_ms = self._pongs[0][0] if heard else self.health.wake_at_ms
            if next_ms >= until_ms:
                return
            self._now_ms = max(self._now_ms, next_ms)
            if heard:
                self._hear(heapq.heappop(self._pongs)[1])
            self._tick()

    def _hear(self, pong: Pong) -> None:
        late_pongs = self.health.late_pongs
        self.health.on_pong(pong, self._now_ms)
        if self.health.late_pongs > late_pongs:
            self._say(f"pong {pong.seq} is late")

    def _tick(self) -> None:
        self.health.on_tick(self._now_ms)
        for action in self.health.take_actions():
            if isinstance(action, Ping):
                self.health.on_sent(action.seq, self._now_ms)
                self._say(f"ping {action.seq}")
                self._answer(action.seq)
            else:
                self._say(f"register, attempt {action.attempt}")

    def _answer(self, seq: int) -> None:
        boot, *flags = self._answers
        if boot != "nothing":
            delay_ms = int(flags[-1]) if "after" in flags else 1
            heapq.heappush(self._pongs, (self._now_ms + delay_ms, pong_of(seq, int(boot), flags)))

    def _on_change(self, change: Change) -> None:
        said = f"{change.old.value} -> {change.new.value}: {change.why}"
        if change.old is not State.DORMANT:
            said += f" ({change.old.value} for {change.lasted_ms} ms"
            said += f", unusable for {change.unusable_ms} ms)" if change.new is State.HEALTHY else ")"
        self._say(said)

    def _say(self, said: str) -> None:
        self._said.append((self._now_ms, said))

    def _take_said(self) -> Iterator[str]:
        said, self._said = self._said, []
        while said:
            pings = next((at for at, (_, what) in enumerate(said) if not what.startswith("ping ")), len(said))
            shown = 1
            at_ms, what = said[0]
            if pings > PINGS_SHOWN_MAX:
                shown = pings
                what = f"{what} and so on, {said[pings - 1][0]} {said[pings - 1][1]}"
            yield INDENT + (what if at_ms == self._now_ms else f"{at_ms} {what}")
            del said[:shown]


def pong_of(seq: int, boot: int, flags: list[str]) -> Pong:
    return Pong(seq, boot, known="unknown" not in flags, ready="draining" not in flags)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    want = path.read_text()
    assert want.startswith("# "), "say what it proves"
    got = "\n".join(Stage().replay(want)) + "\n"
    if os.environ.get("PYTEST_REWRITE"):
        path.write_text(got)
    else:
        assert got == want
