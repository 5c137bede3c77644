"""Which vLLM this connector works with; any other is refused at start."""

import re

from lmconnector.errors import VersionError

# vLLM's contract with its connectors is no stable interface: that of these minor versions was read and tried.
OLDEST = (0, 30)
NEWEST = (0, 33)
SUPPORTED = "0.30 to 0.33"


def why_unsupported(version: str) -> str | None:
    """`version` as vLLM tells it: "0.32.0+cpu", "0.33.1.dev12+g0a1b2c3", "0.31.0rc1"."""
    number = re.match(r"v?(\d+)\.(\d+)", version)
    if number and OLDEST <= (int(number[1]), int(number[2])) <= NEWEST:
        return None
    tell = "is not supported" if number else "is a version that can't be compared"
    return (
        f"vLLM {version} {tell}: lmconnector works with vLLM {SUPPORTED}. Install one of these "
        f"(pip install 'vllm=={NEWEST[0]}.{NEWEST[1]}.*'), look for a newer lmconnector, or leave "
        "--kv-transfer-config out"
    )


def vllm_version() -> str:
    import vllm  # noqa: PLC0415  the rest of this module does without an engine

    return str(vllm.__version__)


def refuse_unsupported_vllm() -> None:
    if reason := why_unsupported(vllm_version()):
        raise VersionError(reason)
