"""Every member's gate against the truth: open for a good server only, shut for a cause, open again soon."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmconnector.health import Change, State
from sim.whole.member import REGISTRATION_DEADLINE_MS, SimMember

if TYPE_CHECKING:
    from sim.whole.system import System

SAMPLED_EVERY_MS = 100  # at least: the server's tick
NEVER_MS = -(10**9)


@dataclass
class Truth:
    """What really was the case between one member and the server."""

    good_awake_ms: int  # last, as the member's process counts time
    bad_ms: int = NEVER_MS  # when the server or the way to it last was
    unknown_ms: int = NEVER_MS  # when the server last did not know it
    changes: int = 0  # of its state that were looked at
    opened_ms: int = NEVER_MS  # last
    why: list[str] = field(default_factory=list)


class Gates:
    def __init__(self, system: "System") -> None:
        self._system = system
        self._truths: dict[SimMember, Truth] = {}

    def sample(self) -> None:
        """Between two of these the truth changes for the better only."""
        for engine in self._system.engines:
            for member in engine.members:
                self._sample(member)

    def on_step(self, member: SimMember) -> None:
        """Of its heartbeat."""
        truth = self._sample(member)
        for change in list(member.heartbeat.changes):
            self._judge(member, truth, change)
        member.heartbeat.changes.clear()
        self.look(member)

    def look(self, member: SimMember) -> None:
        """Somebody is about to rely on the gate."""
        if member.usable and not member.process.is_stalled:
            truth = self._sample(member)
            lie_ms = member.process.awake_ms - truth.good_awake_ms
            bound_ms = self._system.setup.timing.trusted_for_ms
            assert lie_ms <= bound_ms, f"{member.name}: open {lie_ms} ms after the server was good"

    def all_open(self) -> None:
        """Within the bound after the heal, unless operations have been late since."""
        for engine in self._system.engines:
            for member in engine.members:
                healed_ms = self._system.healed_ms
                was_open = member.usable or self._truth(member).opened_ms >= healed_ms
                assert was_open or member.disappointed_ms > healed_ms, (
                    f"{member.name}: {member.heartbeat.health.state} long after the heal: "
                    f"{self._truth(member).why}"
                )

    @property
    def open_within_ms(self) -> int:
        """From the heal on.  A registration may have been lost just before."""
        timing = self._system.setup.timing
        return REGISTRATION_DEADLINE_MS + timing.hold_ms_max + timing.hang_found_within_ms

    def _truth(self, member: SimMember) -> Truth:
        if member not in self._truths:
            self._truths[member] = Truth(member.process.awake_ms)
        return self._truths[member]

    def _sample(self, member: SimMember) -> Truth:
        truth, now_ms = self._truth(member), self._system.time.now_ms
        is_served, is_known = self._is_served(member), self._is_known(member)
        if not is_served:
            truth.bad_ms = now_ms
        if not is_known:
            truth.unknown_ms = now_ms
        if is_served and is_known:
            truth.good_awake_ms = member.process.awake_ms
        return truth

    def _is_served(self, member: SimMember) -> bool:
        server = self._system.server
        if not server.accepts or member.link is None:
            return False
        assert server.service is not None
        return not server.service.draining and member.link.is_whole

    def _is_known(self, member: SimMember) -> bool:
        """Perhaps by a registration of which it has not heard yet."""
        service = self._system.server.service
        return service is not None and member.is_known_to(service.registry)

    def _judge(self, member: SimMember, truth: Truth, change: Change) -> None:
        now_ms = self._system.time.now_ms
        truth.why = [*truth.why[-4:], f"{now_ms} {change.new.value}: {change.why}"]
        if change.new is State.HEALTHY:
            truth.opened_ms = now_ms
        first_use = change.new is State.RECOVERING and change.old in (State.DORMANT, State.DEGRADED)
        if change.new in (State.HEALTHY, State.STOPPED) or first_use:
            return
        caused_ms = max(truth.bad_ms, truth.unknown_ms, member.process.hurt_ms, member.disappointed_ms)
        within_ms = self._caused_within_ms + member.process.stalled_ms
        if change.old is State.RECOVERING:
            within_ms += REGISTRATION_DEADLINE_MS
        assert now_ms - caused_ms <= within_ms, (
            f"{member.name}: {change.new.value} for no cause since {now_ms - caused_ms} ms: {change.why}"
        )

    @property
    def _caused_within_ms(self) -> int:
        timing, faults = self._system.setup.timing, self._system.faults
        return timing.hang_found_within_ms + faults.delay_ms_max + SAMPLED_EVERY_MS
