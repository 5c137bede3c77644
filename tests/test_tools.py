"""A tool that is missing skips its tests on a developer's machine, and fails them where all must run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import REQUIRED, tool

ROOT = Path(__file__).parent.parent
NOWHERE = "a-tool-that-nobody-has"


def test_what_is_there_is_found() -> None:
    assert tool("sh", "dash") == shutil.which("sh")


def test_a_missing_tool_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"no {NOWHERE} here .Debian: apt-get install tools"):
        tool(NOWHERE, "tools")


def test_a_missing_tool_fails_the_test_where_all_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match=f"no {NOWHERE} here.*{REQUIRED} wants all tests"):
        tool(NOWHERE, "tools")


def test_all_must_run_where_ci_runs() -> None:
    assert f"export {REQUIRED}=1" in (ROOT / ".ci" / "run").read_text()


def test_every_tool_that_a_test_asks_for_is_installed_for_it() -> None:
    installed = set(re.findall(r"\b([\w-]+:[\w-]+)\b", (ROOT / ".ci" / "tools").read_text()))
    asked = {
        f"{name}:{package}"
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__)
        for name, package in re.findall(r'\btool\("([\w-]+)", "([\w-]+)"\)', path.read_text())
    }
    assert {"chromium:chromium", "promtool:prometheus"} <= asked <= installed


def test_what_is_missing_is_named_where_it_can_not_be_installed(tmp_path: Path) -> None:
    """A machine of somebody who is not root, and has none of it."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = subprocess.run(
        [str(shutil.which("sh")), ROOT / ".ci" / "tools"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.startswith(
        "some tests will be skipped: install chromium prometheus kubernetes-client gcc"
    )
