"""The house rules that no linter knows."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for package in ("cache_server", "lmconnector") for path in (ROOT / package).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LINES_MAX = 300
FUNCTION_LINES_MAX = 49
SCARS = re.compile(
    r"\b(never hangs?|should never|just in case|defensive(ly)?|workarounds?|hacks?|legacy)\b", re.IGNORECASE
)
# Each machine's own: somebody's directories, and where packages happen to come from.
PLACES = re.compile(
    r"(?<![\w.~-])/(?:work|root|home|Users)/[\w.-]+"
    r"|(?:index-url|trusted-host)[ =:]+\S+"
    r"|https?://[^\s\"')]*/simple\b"
    r"|\b(?:files\.pythonhosted\.org|(?:artifactory|nexus|pypi-proxy)[\w-]*\.[\w.-]+)"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, Function))


def remarks(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every comment and docstring."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.COMMENT or (
            token.type == tokenize.STRING and token.string.startswith('"""')
        ):
            yield token.start[0], token.string


def files_in_git() -> list[Path]:
    """What is tracked, or would be with the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_source_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= LINES_MAX, f"{lines} lines: split the file"
    assert ast.get_docstring(tree_of(path)), "say in one line what the file is for"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_function_fits_on_a_screen(path: Path) -> None:
    lengths = {each.name: (each.end_lineno or 0) - each.lineno + 1 for each in functions(path)}
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES_MAX} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_remark_is_no_scar(path: Path) -> None:
    """Turn it into a state, a type, a limit or a test."""
    assert [(line, text) for line, text in remarks(path) if SCARS.search(text)] == []


def test_no_docstring_is_written_twice() -> None:
    seen: dict[str, str] = {}
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, Function | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
                where = f"{name_of(path)}:{getattr(node, 'lineno', 1)}"
                assert seen.setdefault(text, where) == where, f"{where} repeats {seen[text]}"


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_a_test_file_says_in_one_line_what_it_is_for(path: Path) -> None:
    text = ast.get_docstring(tree_of(path))
    assert text
    assert "\n" not in text.partition("\n\n")[0]


def test_each_unit_test_file_belongs_to_a_source_file() -> None:
    """A package's is named after both: test_transfer_cpu.py is of transfer/cpu.py."""
    sources = {name for path in SOURCES for name in (path.stem.strip("_"), f"{path.parent.name}_{path.stem}")}
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "unit").glob("test_*.py")}
    assert tested - sources == set()


def test_no_file_names_a_machine() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {place[0]}"
        for path in files_in_git()
        if path != Path(__file__)
        for place in PLACES.finditer(text_of(path))
    }
    assert found == set()
