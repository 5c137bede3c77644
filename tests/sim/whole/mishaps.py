"""What happens to a world, by its name in `swarm.EVENTS`."""

from functools import partial
from typing import TYPE_CHECKING

from cache_server.protocol.slots import ENTRY_BYTES
from sim.whole.network import SimLink

if TYPE_CHECKING:
    from sim.whole.engine import Engine
    from sim.whole.system import System


def happen(system: "System", what: str) -> None:
    system.note("fault", what)
    system.checks.gates.sample()
    _happen(system, what)
    system.checks.gates.sample()


def _happen(system: "System", what: str) -> None:
    rng = system.rng
    match what:
        case "cut" | "disconnect":
            _hurt(system, rng.choice(list(system.server.links)), what)
        case "part" | "half open":
            _cut_off(system, rng.choice(system.engines), what)
        case "stall":
            rng.choice(rng.choice(system.engines).processes).stall(rng.randint(1, 4_000))
        case "lose rank":
            _lose_rank(system, rng.choice(system.engines))
        case "die":
            _replace(system, rng.choice(system.engines))
        case "weights":
            rng.choice(system.engines).update_weights()
        case _ if system.server.service is not None:
            _happen_to_the_server(system, what)


def _happen_to_the_server(system: "System", what: str) -> None:
    server, rng, time = system.server, system.rng, system.time
    assert server.service is not None
    match what:
        case "kill" | "restart":
            server.kill(told=rng.random() < 0.8)
            down_ms = 1 if what == "restart" else rng.choice((20, 500, 4_000))
            time.after(rng.randint(1, down_ms), system.start_server)
        case "lose arena":
            server.kill(told=True)
            server.new_arena(populated=rng.random() < 0.5)
            time.after(rng.randint(1, 100), system.start_server)
        case "tear a write":
            down_ms = rng.choice((1, 500))
            revive = partial(time.after, down_ms, system.start_server)
            server.tear_a_write(rng.randint(0, 8), rng.randint(0, ENTRY_BYTES), revive)
        case "freeze":
            server.freeze(rng.randint(1, rng.choice((100, 3_000))))
        case "drain":
            server.service.draining = True
            starts = server.starts
            time.after(rng.randint(1, 1_000), lambda: _end_draining(system, starts))
        case "forget":
            server.mortally(partial(server.forget, rng.randint(0, 99)))
        case "clear" if server.accepts:
            storage = server.service.storage
            server.mortally(lambda: storage.clear(storage.index.spaces))


def _end_draining(system: "System", starts: int) -> None:
    if system.server.starts == starts and system.server.service is not None:
        system.checks.gates.sample()
        system.server.kill(told=True)
        system.time.after(system.rng.randint(1, 500), system.start_server)


def _hurt(system: "System", link: SimLink, what: str) -> None:
    if what == "cut":
        link.cut(system.time.now_ms + system.rng.randint(1, 3_000))
    else:
        link.disconnect()
        link.reconnect()


def _cut_off(system: "System", engine: "Engine", what: str) -> None:
    """All of its processes or some; both ways, or one."""
    rng, until_ms = system.rng, system.time.now_ms + system.rng.randint(1, 3_000)
    there, back = (True, True) if what == "part" else rng.choice(((True, False), (False, True)))
    processes = engine.processes
    for process in rng.sample(processes, rng.randint(1, len(processes))):
        process.there_cut_ms = until_ms if there else process.there_cut_ms
        process.back_cut_ms = until_ms if back else process.back_cut_ms


def _lose_rank(system: "System", engine: "Engine") -> None:
    """vLLM takes its time to see that a worker is gone."""
    if engine.model.ranks == 1:
        return
    engine.lose_rank(system.rng.randrange(engine.model.ranks))
    system.time.after(system.rng.randint(1, 3_000), lambda: _replace(system, engine))


def _replace(system: "System", engine: "Engine") -> None:
    if engine not in system.engines:
        return  # it has died meanwhile
    engine.die()
    system.engines.remove(engine)
    system.dead.append(engine)
    system.new_engine(engine.model)
