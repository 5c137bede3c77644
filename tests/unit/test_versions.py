"""Which vLLM is served and which is refused, and how it is said."""

import pytest

from lmconnector.versions import why_unsupported


@pytest.mark.parametrize(
    "version",
    [
        "0.30.0",
        "0.31.2",
        "0.32.0+cpu",
        "0.32.1.dev12+g0a1b2c3.d20260101",
        "0.33.0rc1",
        "0.33.0.post1",
        "v0.33.0",
        "0.33",
    ],
)
def test_the_versions_whose_contract_is_known_are_served(version: str) -> None:
    assert why_unsupported(version) is None


@pytest.mark.parametrize(
    "version", ["0.29.1", "0.3.0", "0.34.0", "0.34.0.dev3+gabc", "0.330.0", "1.30.0", "0.1.dev1+gabc"]
)
def test_any_other_is_refused_with_what_was_found_what_is_served_and_what_to_do(version: str) -> None:
    said = why_unsupported(version)
    assert said is not None
    assert said.startswith(
        f"vLLM {version} is not supported: lmconnector works with vLLM 0.30 to 0.33. Install "
    )


@pytest.mark.parametrize("version", ["dev", "", "0", "unknown"])
def test_what_is_no_version_is_refused_as_such(version: str) -> None:
    assert "can't be compared" in (why_unsupported(version) or "")
