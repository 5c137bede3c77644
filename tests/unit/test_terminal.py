"""What the demo prints: plain where nobody watches, lively on a terminal."""

import io
import time

import pytest

from lmconnector.demo.terminal import RED, Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_file_gets_no_control_characters() -> None:
    out = io.StringIO()
    terminal = Terminal(out)
    terminal.line("hello", RED)
    terminal.living(time.monotonic(), "still there")
    assert out.getvalue() == "hello\n"


def test_a_file_is_told_of_a_long_wait_now_and_then() -> None:
    out = io.StringIO()
    terminal = Terminal(out)
    for _ in range(3):
        terminal.living(time.monotonic() - 12, "still there")
    assert out.getvalue() == "      12 s  still there\n"


def test_a_terminal_has_one_living_line_which_the_next_line_replaces() -> None:
    out = Screen()
    terminal = Terminal(out)
    terminal.living(time.monotonic(), "word " * 30)
    terminal.line("ready", RED)
    living, line = out.getvalue().removeprefix("\r\x1b[2K").split("\r\x1b[2K")
    assert "\n" not in living
    assert len(living.replace("\x1b[2m", "").replace("\x1b[0m", "")) < 40
    assert line == "\x1b[31mready\x1b[0m\n"


def test_colours_are_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert Terminal(Screen()).styled("ready", RED) == "ready"


def test_an_item_stands_beside_its_head() -> None:
    out = io.StringIO()
    Terminal(out).item("  yes  ", "one two three four five six seven eight nine ten")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("  yes  one")
    assert all(line.startswith("       ") and not line.startswith("        ") for line in lines[1:])
    assert max(map(len, lines)) <= 40


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "███"), ("ascii", "###"), ("iso-8859-1", "###")])
def test_a_bar_is_drawn_with_what_there_is(encoding: str, bar: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert Terminal(out).bar(3, RED) == bar
