"""What end-to-end tests share: models, made once, and an engine without a cache, which says what is right."""

import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from e2e.kit import Plain

pytest.importorskip(
    "vllm", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)


with warnings.catch_warnings():  # of its own deprecations, while it is imported
    warnings.simplefilter("ignore")
    importlib.import_module("lmconnector.connector")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from lmconnector.demo.model import make

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(tmp_path_factory.mktemp("models") / kind, kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def plain(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Plain]":
    """Of the kind `llama`.  It starts beside the first engine that is compared with it."""
    from e2e.kit import Engine, Plain

    log = tmp_path_factory.mktemp("plain") / "engine.log"
    engine = Engine(log, cores="1", model=str(model("llama")), enable_prefix_caching=False)
    try:
        yield Plain(engine)
    finally:
        engine.close()
