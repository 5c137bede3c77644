"""What is said of this machine's settings."""

import pytest

from lmconnector.doctor.findings import Verdict
from lmconnector.doctor.machine import hash_stability, memory_lock, ours


def test_the_default_hashes_are_fine_without_any_setting() -> None:
    assert hash_stability("sha256", {}).verdict is Verdict.OK


def test_a_seed_is_a_secret_and_can_still_be_compared_between_hosts() -> None:
    found = {seed: hash_stability("sha256", {"PYTHONHASHSEED": seed}) for seed in ("1234567890", "987654321")}
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert all("PYTHONHASHSEED, which is set" in finding.found for finding in found.values())
    assert not any(seed in str(finding) for seed, finding in found.items())
    assert hash_stability("sha256", {"PYTHONHASHSEED": "1234567890"}) == found["1234567890"]
    assert len({finding.found for finding in found.values()}) == 2


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_hashes_that_nobody_else_can_compute_are_a_warning_that_says_what_to_set(algorithm: str) -> None:
    finding = hash_stability(algorithm, {})
    assert finding.verdict is Verdict.WARN
    assert finding.advice.startswith("Use --prefix-caching-hash-algo sha256")
    assert "PYTHONHASHSEED" in finding.advice


def test_versions_and_limits_are_told() -> None:
    assert ours().found.startswith("lmconnector 0.")
    assert "KiB" in memory_lock() or "unlimited" in memory_lock()
