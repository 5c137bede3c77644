"""May this process register?  Pure."""

from collections.abc import Callable

from cache_server.limits import Limits, RefusedError
from cache_server.protocol import messages as m
from cache_server.protocol.keys import owner_of
from cache_server.protocol.messages import Code
from cache_server.workers import Registry


def check_version(request: m.Register) -> None:
    if request.version_min > m.VERSION_MAX or request.version_max < m.VERSION_MIN:
        raise RefusedError(
            Code.VERSION,
            f"this server speaks protocol {m.VERSION_MIN}..{m.VERSION_MAX}, "
            f"you speak {request.version_min}..{request.version_max}: update the older side",
        )


def check_registration(
    request: m.Register, registry: Registry, limits: Limits, is_locked: Callable[[str], bool]
) -> None:
    if request.role == "worker" and request.layout is None:
        raise RefusedError(Code.MALFORMED, "a worker registers with its `layout`")
    if not request.proof.startswith(owner_of(request.engine).hex() + "."):
        raise RefusedError(Code.NO_PROOF, "`proof` begins with the engine's owner digest in hex and a dot")
    if not is_locked(request.proof):
        raise RefusedError(
            Code.NO_PROOF, f"no process holds a lock on locks/{request.proof}: lock it, then register"
        )
    _check_that_its_start_is_the_only_one(request, registry, is_locked)
    if registry.has_place_of(request):
        return
    if m.CANARY in request.features:
        if registry.canaries >= limits.canaries_max:
            raise RefusedError(Code.BUSY, f"{registry.canaries} canaries run, the most there can be")
    elif len(registry) - registry.canaries >= limits.members_max:
        raise RefusedError(Code.BUSY, f"{limits.members_max} processes are registered, the most there can be")


def _check_that_its_start_is_the_only_one(
    request: m.Register, registry: Registry, is_locked: Callable[[str], bool]
) -> None:
    """What is reserved goes by the engine's name: two that live under one would give back the slots that the
    other one writes into.  The first stays until it is dead."""
    engine = registry.engines.get(request.engine)
    for member in engine.members.values() if engine is not None else ():
        other = member.registration
        if _is_of_another_start(other, request) and is_locked(other.proof):
            raise RefusedError(
                Code.BUSY,
                f"engine {other.engine}, {other.role} {other.rank} is process {other.pid} and lives: "
                "give each engine an engine_id of its own",
            )


def _is_of_another_start(other: m.Register, request: m.Register) -> bool:
    if other.proof == request.proof:
        return False
    return other.instance != request.instance or (other.role, other.rank) == (request.role, request.rank)
