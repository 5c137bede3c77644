"""Block hashes that agree over processes, and those that can't."""

import pytest

from lmconnector.geometry import ChunkLayout
from lmconnector.hashes import seed, why_unstable

CRYPTOGRAPHIC = ["sha256", "sha256_cbor"]
OTHER = ["xxhash", "xxhash_cbor", "one of a later vLLM"]


@pytest.mark.parametrize("algorithm", CRYPTOGRAPHIC)
def test_cryptographic_hashes_agree_without_any_setting(algorithm: str) -> None:
    assert why_unstable(algorithm, {}) is None
    assert seed(algorithm, {}) == "vllm-none-hash"


@pytest.mark.parametrize("algorithm", OTHER)
def test_others_agree_only_with_a_seed_that_is_given(algorithm: str) -> None:
    reason = why_unstable(algorithm, {})
    assert reason is not None
    assert reason.startswith(f"block hashes by {algorithm} begin with a seed that vLLM draws anew")
    assert "PYTHONHASHSEED" in reason
    assert why_unstable(algorithm, {"PYTHONHASHSEED": "7"}) is None


@pytest.mark.parametrize("algorithm", [*CRYPTOGRAPHIC, *OTHER])
@pytest.mark.parametrize("given", ["0", "7", "random", ""])
def test_a_given_seed_counts_whatever_the_algorithm(algorithm: str, given: str) -> None:
    assert seed(algorithm, {"PYTHONHASHSEED": given}) == given
    assert seed(algorithm, {"PYTHONHASHSEED": given}) != seed(algorithm, {})


def test_a_chunk_goes_by_32_bytes_also_where_vllms_hash_is_shorter() -> None:
    layout = ChunkLayout(chunk_tokens=32, hash_tokens=16, groups=())
    hashes = layout.chunk_hashes([bytes([number]) * 16 for number in range(5)])
    assert hashes == [b"\1" * 16 + bytes(16), b"\3" * 16 + bytes(16)]
    assert layout.chunk_hashes([b"\5" * 32, b"\6" * 32]) == [b"\6" * 32]
