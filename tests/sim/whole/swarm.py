"""What a world is like and what goes wrong in it, all from one seed.  Most worlds have most faults off."""

from dataclasses import dataclass, field, replace
from random import Random

import msgspec

from cache_server.limits import Limits
from cache_server.protocol.slots import SLOT_ALIGN, Geometry
from lmconnector.config import Options
from lmconnector.health import Timing
from sim.whole.model import Model
from sim.whole.vllm_request import EngineSize

TIMINGS = (
    Timing(interval_ms=200, timeout_ms=50, hold_ms_max=1_000),
    Timing(interval_ms=500, timeout_ms=100, fail_after=2, hold_ms_max=2_000),
    Timing(),
)
EVENTS = (
    "kill", "restart", "tear a write", "freeze", "drain", "forget", "lose arena", "clear",  # the server
    "cut", "disconnect",  # a connection
    "part", "half open",  # processes of an engine and the server
    "stall", "die", "lose rank", "weights",  # an engine
)  # fmt: skip
CROWDED = 0.2  # of the worlds
BURSTING = 0.25
CALM = 0.2  # of them: nothing fails, copies and steps may be slow
FAULTS_UNTIL_MS = 5_000  # from the start


@dataclass(frozen=True)
class Setup:
    """Sizes are tiny: what matters happens at boundaries."""

    models: tuple[Model, ...]  # the engines run them in turn
    engines: int
    options: Options
    timing: Timing
    geometry: Geometry
    limits: Limits
    policy: str
    requests: int
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    same_prompt: float  # that a request asks for the one before's
    burst: float = 0.0  # that the same is asked for twice at once

    @classmethod
    def draw(cls, rng: Random) -> "Setup":
        model = draw_model(rng, b"model")
        engines = rng.choice((1, 1, 2, 2, 3))
        models = [model]
        if engines > 1 and rng.random() < 0.3:
            models.append(
                rng.choice((draw_model(rng, b"other"), replace(model, namespace=b"other", weights=50)))
            )
        chunk = model.chunk_tokens
        groups = max(len(one.size.windows) for one in models)
        slot_bytes = SLOT_ALIGN * max(one.parts for one in models)
        slots_per_slab = rng.choice((2, 4))
        stock = rng.choice((1, 2, 4, 8))
        slots = rng.choice((6, 12, 24, 48)) + 2 * stock * engines * groups
        slabs = max(2, -(-slots // slots_per_slab))
        capacity = slabs * slots_per_slab * slot_bytes
        prompt_max = min(5 * chunk + 1, min(one.size.request_tokens_max for one in models) * 2 // 3)
        setup = cls(
            models=tuple(models),
            engines=engines,
            options=Options(
                dir="simulated",
                lookup_wait_ms=rng.choice((0, 2, 2, 5)),
                lookup_deadline_ms=rng.choice((5, 50, 50, 200)),
                request_deadline_ms=rng.choice((50, 500, 2_000)),
                sync_load_ms=rng.choice((0.0, 10.0, 10.0)),
                store_decode=rng.random() < 0.5,
                stock_slots=stock,
            ),
            timing=rng.choice(TIMINGS),
            geometry=Geometry(capacity, slots_per_slab * slot_bytes),
            limits=Limits(
                lease_ms=rng.choice((40, 400, 3_000, 30_000)),
                reclaim_grace_ms=500,
                stock_bytes_max=max(groups * slot_bytes, capacity * rng.choice((1, 2, 4)) // 8),
                reserved_bytes_max=max(
                    2 * engines * groups * slot_bytes, capacity * rng.choice((2, 4, 6)) // 8
                ),
                leases_per_engine_max=rng.choice((2, 16_384, 16_384)),
            ),
            policy=rng.choice(("lru", "lrfu")),
            requests=rng.randint(4, 20) * engines,
            prompts=tuple(draw_prompts(rng, chunk, prompt_max)),
            max_tokens=rng.choice((1, 3, 2 * chunk)),
            same_prompt=rng.choice((0.1, 0.5)),
        )
        setup = setup.crowded(rng) if rng.random() < CROWDED else setup
        state = rng.getstate()
        setup = setup.bursting(rng) if rng.random() < BURSTING else setup
        rng.setstate(state)  # whatever is drawn after it is what it was before there were bursts
        return setup

    def bursting(self, rng: Random) -> "Setup":
        """Requests share their prompts while these are loaded before a step, which fails often, and are
        computed part by part."""
        part_tokens = rng.choice((0, 2, 5))
        models = [replace(one, size=replace(one.size, part_tokens=part_tokens)) for one in self.models]
        options = msgspec.structs.replace(self.options, sync_load_ms=1_000.0)
        return replace(self, models=tuple(models), options=options, burst=rng.choice((0.3, 0.9)))

    def crowded(self, rng: Random) -> "Setup":
        """Slots change hands all the time: there are few, no lease lasts, and many ask for many prompts."""
        chunk = self.models[0].chunk_tokens
        prompt_max = max(len(prompt) for prompt in self.prompts)
        groups = max(len(one.size.windows) for one in self.models)
        slot_bytes = SLOT_ALIGN * max(one.parts for one in self.models)
        engines = max(2, self.engines)
        slots = 4 + 2 * engines * groups
        return replace(
            self,
            engines=engines,
            options=msgspec.structs.replace(self.options, stock_slots=1, request_deadline_ms=2_000),
            geometry=Geometry(-(-slots // 2) * 2 * slot_bytes, 2 * slot_bytes),
            limits=replace(
                self.limits,
                lease_ms=40,
                stock_bytes_max=2 * groups * slot_bytes,
                reserved_bytes_max=2 * engines * groups * slot_bytes,
            ),
            requests=30 * engines,
            prompts=tuple(prompt for _ in range(3) for prompt in draw_prompts(rng, chunk, prompt_max)),
            max_tokens=1,
            same_prompt=0.1,
        )


def draw_model(rng: Random, namespace: bytes) -> Model:
    ranks = rng.choice((1, 1, 1, 2, 2, 4))
    block_tokens = rng.choice((2, 3, 4))
    hybrid = rng.random() < 0.3
    depth = rng.choice((1, 1, 2))
    return Model(
        namespace=namespace,
        weights=rng.randint(0, 2),
        ranks=ranks,
        replicas=rng.choice((1, 1, ranks)),
        blocks_per_chunk=rng.choice((1, 2, 3)),
        size=EngineSize(
            block_tokens=block_tokens,
            blocks=rng.choice((12, 20, 40, 80)),
            windows=(0, rng.choice((2, block_tokens + 1, 3 * block_tokens))) if hybrid else (0,),
            requests_max=rng.choice((1, 3, 8)),
            step_tokens=rng.choice((3, 8, 40)),
            depth=depth,
            local_cache=rng.random() < 0.5,
            placeholders=depth > 1 and rng.random() < 0.7,
        ),
    )


def draw_prompts(rng: Random, chunk: int, length_max: int) -> list[tuple[int, ...]]:
    """Some begin alike; lengths lie around the chunks' boundaries."""
    pieces = [tuple(range(100 * at, 100 * at + chunk)) for at in range(rng.choice((3, 4, 9)))]
    prompts = []
    for _ in range(rng.choice((2, 4, 12))):
        prompt: tuple[int, ...] = ()
        for _ in range(rng.randint(1, 4)):
            prompt += rng.choice(pieces[:-1])
        prompt += pieces[-1][: rng.choice((0, 0, 1, chunk - 1))]
        prompts.append(prompt[: max(2, length_max)])
    return prompts


@dataclass(frozen=True)
class Faults:
    delay_ms_max: int = 0
    loss: float = 0.0
    duplicate: float = 0.0
    garble: float = 0.0
    stall: float = 0.0  # at each look at the clock, and in the midst of whatever it is
    copy_ms_max: int = 2
    copy_failure: float = 0.0
    step_ms_max: int = 3
    drift_ms_max: int = 0
    registration_ms_max: int = 5
    abort: float = 0.0  # per request
    abort_ms_max: int = 30  # after it was asked for
    abort_loading: float = 0.0  # per load, while it goes on
    events: tuple[tuple[int, str], ...] = field(default=())  # (at ms, what)

    @classmethod
    def draw(cls, rng: Random) -> "Faults":
        def maybe(*values: float) -> float:
            return rng.choice(values) if rng.random() < 0.5 else 0

        if rng.random() < CALM:
            return cls(copy_ms_max=rng.choice((2, 50, 200)), step_ms_max=rng.choice((0, 3, 20)))
        often = rng.choice((0.0, 0.05, 0.15, 0.4))
        events = [
            (rng.randint(0, FAULTS_UNTIL_MS), kind)
            for kind in EVENTS
            if rng.random() < often
            for _ in range(rng.randint(1, 3))
        ]
        return cls(
            delay_ms_max=int(maybe(1, 3, 3, 30, 30, 300)),
            loss=maybe(0, 0, 0.01, 0.1),
            duplicate=maybe(0, 0.1),
            garble=maybe(0, 0, 0.02),
            stall=maybe(0, 0, 0.001),
            copy_ms_max=int(maybe(10, 200, 3_000)) or 2,
            copy_failure=maybe(0.05, 0.3),
            step_ms_max=rng.choice((0, 3, 20)),
            drift_ms_max=int(maybe(1, 10)),
            registration_ms_max=int(maybe(100, 3_000)) or 5,
            abort=maybe(0.1, 0.5),
            abort_ms_max=rng.choice((5, 50, 500)),
            abort_loading=maybe(0.1, 0.5),
            events=tuple(sorted(events)),
        )

    def as_in(self, setup: Setup) -> "Faults":
        return replace(self, copy_failure=0.3, abort_loading=0.3) if setup.burst else self
