"""What is installed and allowed here: versions, the memory lock limit, the seed of the block hashes."""

import importlib.metadata
import importlib.util
import platform
import resource
from collections.abc import Mapping

from cache_server.protocol import messages as m
from lmconnector import __version__, hashes
from lmconnector.doctor.findings import Finding, fail, ok, warn
from lmconnector.plugin import CONNECTOR
from lmconnector.versions import SUPPORTED, vllm_version, why_unsupported

PLUGINS = "vllm.general_plugins"


def ours() -> Finding:
    points = importlib.metadata.entry_points(group=PLUGINS)
    plugged = any(point.value.startswith("lmconnector.") for point in points)
    speaks = f"protocol {m.VERSION_MIN}..{m.VERSION_MAX}"
    found = f"lmconnector {__version__}, {speaks}, Python {platform.python_version()}"
    if plugged:
        return ok("version", f"{found}; vLLM knows {CONNECTOR} by its name")
    advice = "say kv_connector_module_path (lmconnector config does), or install lmconnector again"
    return warn("version", f"{found}; its entry point for vLLM is not installed", advice)


def torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        advice = "fine beside a server; where an engine runs, install vLLM, which brings it"
        return warn("torch", "not installed here", advice)
    import torch as library  # noqa: PLC0415  only where it is

    devices = library.cuda.device_count()
    names = f"{devices} CUDA device(s), {library.cuda.get_device_name()}" if devices else "no CUDA device"
    return ok("torch", f"{library.__version__}, {names}")


def vllm() -> Finding:
    if importlib.util.find_spec("vllm") is None:
        advice = f"fine beside a server; where an engine runs, install vLLM {SUPPORTED}"
        return warn("vllm", "not installed here", advice)
    try:
        version = vllm_version()
    except ImportError as error:
        return fail("vllm", f"can't be imported: {error}", f"install vLLM {SUPPORTED} again")
    if reason := why_unsupported(version):
        found, _, advice = reason.partition(". ")
        return fail("vllm", found, advice)
    return ok("vllm", f"{version}; lmconnector works with {SUPPORTED}")


def memory_lock() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return _size(soft) if soft == hard else f"{_size(soft)} (at most {_size(hard)})"


def hash_stability(algorithm: str, environment: Mapping[str, str]) -> Finding:
    if reason := hashes.why_unstable(algorithm, environment):
        found, _, advice = reason.partition(". ")
        return warn("hashes", found, advice)
    given = environment.get(hashes.SEED)
    if given is None:
        return ok("hashes", f"{algorithm} from vLLM's fixed seed: alike in every engine")
    return ok(
        "hashes",
        f"{algorithm} from {hashes.SEED}, which is set, mark {hashes.mark(given)}: alike in engines that are "
        "given the same, and show the same mark",
    )


def _size(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
