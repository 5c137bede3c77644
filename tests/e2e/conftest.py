"""Models for end-to-end tests, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from e2e.model import make

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return get
