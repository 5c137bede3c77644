"""Whether vLLM's block hashes, by which chunks go, come out alike in every process.  Pure.

vLLM chains a prompt's hashes from a seed: `PYTHONHASHSEED` where it is set; else a fixed one for algorithms
that nobody can find collisions of, and random bytes, drawn anew in each process, for all others.
"""

import hashlib
from collections.abc import Mapping

SEED = "PYTHONHASHSEED"
FIXED_SEED = "vllm-none-hash"
WITH_FIXED_SEED = ("sha256", "sha256_cbor")
DRAWN = "drawn in each process"
MARK_BYTES = 2  # a seed has 32 bits, and who knows more of its digest finds it by trying


def seed(algorithm: str, environment: Mapping[str, str]) -> str:
    """What the seed will be.  vLLM draws it in the scheduler's process only, and after it has made the
    connectors: so all of them go by what decides it, and agree."""
    return environment.get(SEED, FIXED_SEED if algorithm in WITH_FIXED_SEED else DRAWN)


def mark(given: str) -> str:
    """By it people see whether two hosts have the same secret seed, without being shown it."""
    return hashlib.blake2b(given.encode(), digest_size=MARK_BYTES).hexdigest()


def why_unstable(algorithm: str, environment: Mapping[str, str]) -> str | None:
    if seed(algorithm, environment) != DRAWN:
        return None
    return (
        f"block hashes by {algorithm} begin with a seed that vLLM draws anew in each process, as {SEED} is "
        "not set: no other engine, nor this one after a restart, finds what this one stores. Use "
        "--prefix-caching-hash-algo sha256 (vLLM's default), or start all engines with the same "
        f"{SEED}, a secret one"
    )
