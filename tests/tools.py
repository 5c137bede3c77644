"""What tests need of the machine beside Python: without it they are skipped, or fail where nothing may be."""

import os
import shutil
from typing import NoReturn

import pytest

REQUIRED = "LMCONNECTOR_REQUIRE_TOOLS"


def all_is_required() -> bool:
    return os.environ.get(REQUIRED) == "1"


def lacking(what: str) -> NoReturn:
    """Ends the test that can't be done here."""
    if all_is_required():
        pytest.fail(f"{what}; {REQUIRED} wants all tests", pytrace=False)
    pytest.skip(what)


def tool(name: str, package: str) -> str:
    """-> its path"""
    path = shutil.which(name)
    if path is None:
        lacking(f"no {name} here (Debian: apt-get install {package})")
    return path
