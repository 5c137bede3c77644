"""The whole system in one process and in simulated time, and everything that goes wrong with it.

The real server, several engines with the real connector, a network between them.  At the end all of it heals,
and must work.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import msgspec

from sim.whole.cache_process import CacheProcess
from sim.whole.checks import Checks
from sim.whole.engine import Engine
from sim.whole.mishaps import happen
from sim.whole.model import Model
from sim.whole.network import Network
from sim.whole.ranks import Speed
from sim.whole.swarm import FAULTS_UNTIL_MS, Faults, Setup
from sim.whole.timeline import Timeline
from sim.whole.vllm_request import Request

FINISH_MS_MAX = 60_000  # from the heal until every request is answered and every copy has ended
HIT_TRIES = 12
NUDGE = (1,)  # a prompt of which nothing is stored: it makes an engine step
ROUNDS_MAX = 12  # until engines and server agree on who holds what


class System:
    def __init__(
        self,
        rng: Random,
        setup: Setup | None = None,
        faults: Faults | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.rng = rng
        self.setup = setup or Setup.draw(rng)
        drawn = faults or Faults.draw(rng).as_in(self.setup)
        self.faults = self.drawn = drawn  # at this moment; while they go on
        self.time = Timeline()
        self.healed_ms = 0
        self.network = Network(self.time, rng, slow_ms=self.setup.timing.timeout_ms // 2)
        self.speed = Speed()
        self.checks = Checks(self)
        self.server = CacheProcess(self.time, self.setup.geometry, self.setup.limits, self.setup.policy)
        self.server.on_tick = self.checks.on_tick
        self.engines: list[Engine] = []
        self.dead: list[Engine] = []
        self.asked: list[Request] = []
        self._tell = tell
        self._history = hashlib.sha256()
        self._names = self._requests = 0
        self._last_prompt = self.setup.prompts[0]

    @property
    def trace(self) -> str:
        """Equal traces: equal histories."""
        return self._history.hexdigest()

    def note(self, *what: object) -> None:
        line = f"{self.time.now_ms} {' '.join(map(str, what))}"
        self._history.update(line.encode())
        if self._tell is not None:
            self._tell(line)

    # A life

    def live(self) -> None:
        self.note(self.setup)
        self.note(self.faults)
        self._apply(self.faults)
        begin_ms = self.time.now_ms
        late_ms = self.rng.choice((0, 0, 300))
        self.time.after(late_ms, self.start_server)
        for number in range(self.setup.engines):
            self.new_engine(self.setup.models[number % len(self.setup.models)])
        self.time.run_until(begin_ms + self.rng.choice((0, 600, 600, 600)))  # most engines find a server
        begin_ms = self.time.now_ms
        for at_ms, what in self.faults.events:
            self.time.at(begin_ms + at_ms, lambda what=what: happen(self, what))
        busy_ms = self.rng.choice((300, 2_000, FAULTS_UNTIL_MS))
        for _ in range(self.setup.requests):
            self.time.at(begin_ms + self.rng.randint(0, busy_ms), self._ask_somebody)
        end_ms = begin_ms + max([busy_ms, *(at_ms for at_ms, _ in self.faults.events)])
        self.time.run_until(end_ms)
        self._heal()
        self._finish()
        self._hit_again()
        self._come_to_rest()
        self.checks.at_rest()

    def start_server(self) -> None:
        if self.server.service is None:
            self.server.start()

    def new_engine(self, model: Model) -> Engine:
        self._names += 1
        engine = Engine(
            f"engine-{self._names}",
            model,
            msgspec.structs.replace(self.setup.options, chunk_tokens=model.chunk_tokens),
            self.setup.timing,
            self.network,
            self.server,
            self.rng,
            self.checks,
            self.speed,
        )
        engine.step_ms_max, engine.drift_ms_max = self.faults.step_ms_max, self.faults.drift_ms_max
        engine.idle_ms = self.rng.choice((1, 5))
        self._apply_to(engine, self.faults)
        self.engines.append(engine)
        engine.start()
        return engine

    def _apply(self, faults: Faults) -> None:
        network, speed = self.network, self.speed
        network.delay_ms_max, network.loss = faults.delay_ms_max, faults.loss
        network.duplicate, network.garble = faults.duplicate, faults.garble
        speed.ms_max, speed.failure = faults.copy_ms_max, faults.copy_failure
        for engine in self.engines:
            self._apply_to(engine, faults)

    def _apply_to(self, engine: Engine, faults: Faults) -> None:
        for process in engine.processes:
            process.stall_chance = faults.stall
        for member in engine.members:
            member.registration_ms_max = faults.registration_ms_max

    # Requests

    def _ask_somebody(self) -> None:
        engine = self.rng.choice(self.engines)
        self.ask(engine)
        if self.setup.burst and self.rng.random() < self.setup.burst:
            self.ask(engine, self._last_prompt)

    def ask(self, engine: Engine, prompt: tuple[int, ...] | None = None) -> Request:
        rng, setup = self.rng, self.setup
        self._requests += 1
        skips = prompt is None and rng.random() < 0.02
        if prompt is None:
            prompt = self._last_prompt if rng.random() < setup.same_prompt else rng.choice(setup.prompts)
        self._last_prompt = prompt
        size = engine.model.size
        max_tokens = max(
            1,
            min(
                rng.randint(1, setup.max_tokens if prompt != NUDGE else 1),
                size.request_tokens_max - len(prompt),
            ),
        )
        request = Request(f"r{self._requests}", prompt, max_tokens, size.block_tokens)
        request.skip_reading_prefix_cache = skips
        self.asked.append(request)
        self.note("ask", engine.name, request.request_id, len(prompt), max_tokens)
        engine.ask(request)
        if rng.random() < self.faults.abort:
            self.time.after(rng.randint(0, self.faults.abort_ms_max), lambda: self._abort(engine, request))
        return request

    @property
    def counts(self) -> Counter[str]:
        """What all engines' connectors counted."""
        total: Counter[str] = Counter()
        for engine in (*self.engines, *self.dead):
            for side in (engine.side, *engine.workers):
                total += side.counts
        return total

    def perhaps_abort_loading(self, engine: Engine, request: Request) -> None:
        if self.rng.random() < self.faults.abort_loading:
            self.time.after(self.rng.randint(0, 5), lambda: self._abort(engine, request))

    def perhaps_abort_failed(self, engine: Engine, request_id: str) -> None:
        """Before its next step."""
        if self.setup.burst and self.rng.random() < self.faults.abort_loading:
            self.note("abort", request_id)
            engine.abort(request_id)

    def _abort(self, engine: Engine, request: Request) -> None:
        self.note("abort", request.request_id)
        engine.abort(request.request_id)

    # After the last fault

    def _heal(self) -> None:
        self.note("heal")
        self.checks.leases_held()
        self.healed_ms = self.time.now_ms
        self.faults = replace(
            Faults(), delay_ms_max=min(self.faults.delay_ms_max, 1), step_ms_max=self.faults.step_ms_max
        )
        self._apply(self.faults)
        if self.server.service is not None and self.server.service.draining:
            self.server.kill(told=True)
        self.start_server()
        self.server.spare()
        self.server.thaw()
        for link in list(self.server.links):
            link.cut(0)
            link.reconnect()
        for engine in self.engines:
            for process in engine.processes:
                process.there_cut_ms = process.back_cut_ms = 0
                process.end_stall()
        self.time.after(self.checks.gates.open_within_ms, self.checks.gates.all_open)

    def _finish(self) -> None:
        """Everything that was asked comes to its end, and nothing is left of it."""
        until_ms = self.time.now_ms + FINISH_MS_MAX
        while any(engine.unfinished for engine in self.engines):
            assert self.time.now_ms < until_ms, f"stuck: {self.checks.stuck()}"
            self.time.run_until(self.time.now_ms + 100)
        self.note("finished")

    def _hit_again(self) -> None:
        """What one engine has stored, another one finds."""
        setup = self.setup
        self.time.run_until(max(self.time.now_ms, self.healed_ms + self.checks.gates.open_within_ms))
        writer = self.engines[0]
        model = writer.model
        reader = [engine for engine in self.engines if engine.model is model][-1]
        if not model.stores_whole_chunks:
            return
        self._catch_up(writer, reader)
        prompt = tuple(range(9_000, 9_000 + model.chunk_tokens + 1))
        for _ in range(HIT_TRIES):
            self._ask_alone(writer, prompt)
            before = reader.side.counts["hit_tokens"]
            reader.scheduler.pool.reset()
            self._ask_alone(reader, prompt)
            if reader.side.counts["hit_tokens"] > before:
                return
            self.time.run_until(self.time.now_ms + setup.timing.hold_ms_max)
        raise AssertionError(
            f"no hits after all is well: {dict(writer.side.counts)} {dict(reader.side.counts)}"
        )

    def _ask_alone(self, engine: Engine, prompt: tuple[int, ...]) -> None:
        for asked in (NUDGE, prompt):  # with the first one's steps it gets the slots that it lacks
            self.ask(engine, asked)
            self._finish()
            self.time.run_until(self.time.now_ms + 500)

    def _catch_up(self, *engines: Engine) -> None:
        """All of them with the same weights."""
        newest = max(engine.weights for engine in engines)
        while behind := [engine for engine in engines if engine.weights < newest]:
            behind[0].update_weights()
            self.time.run_until(self.time.now_ms + 10)
            assert not behind[0].reset_wanted

    def _come_to_rest(self) -> None:
        """What is owed to the server is said with an engine's next steps; then nobody asks for anything."""
        for round_ in range(ROUNDS_MAX):
            for engine in self.engines:
                self.ask(engine, NUDGE)
            self._finish()
            self.time.run_until(self.time.now_ms + 2_500)
            if round_ > 1 and not any(engine.side.stores.stock._unsure for engine in self.engines):
                break
        self.checks.leases_released()
        self.time.run_until(self.time.now_ms + self.setup.limits.lease_ms + 1_000)
        for engine in self.engines:
            engine.client.poll(0)  # as its next step would
