"""What the canary does: its size and its namespace's shape, from JSON or a file of it."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

DEFAULT_JOB = "{}"
FILE_MARK = "@"
FILE_BYTES_MAX = 65_536


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    chunks: Annotated[int, Meta(ge=1, le=16)] = 1
    part_bytes: Annotated[int, Meta(ge=0, le=2**30)] = 0  # of a chunk; 0: as the slots that are in use
    window: Annotated[int, Meta(ge=0, le=16)] = 0
    check_bytes: Annotated[int, Meta(ge=1, le=2**30)] = 4096  # written and compared at each end of a chunk


def parse_job(text: str) -> Job:
    """Raises `ValueError` with what was expected."""
    expected = f"expected JSON such as {msgspec.json.encode(Job()).decode()}, or @FILE with it"
    try:
        content = _read(Path(text[1:])) if text.startswith(FILE_MARK) else text.encode()
        return msgspec.json.decode(content, type=Job)
    except OSError as error:
        raise ValueError(f"{expected}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ValueError(f"{expected}: {error}") from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(FILE_BYTES_MAX + 1)
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"expected a file of at most {FILE_BYTES_MAX} bytes")
    return content
