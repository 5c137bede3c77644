"""Planted bugs in the engine's heartbeat, for its own simulation."""

import dataclasses

from lmconnector.health import Health, Pong, State
from lmconnector.heartbeat import Heartbeat

NEVER_MS = 10**9


class BelievesEveryPing(Health):
    """A ping that is answered is all there is to know: a restart between two pings stays unseen."""

    def on_pong(self, pong: Pong, now_ms: int) -> None:
        super().on_pong(dataclasses.replace(pong, known=True, boot=self._boot), now_ms)


class IgnoresTheBoot(Health):
    def _judge(self, pong: Pong, prompt: bool, now_ms: int) -> None:
        super()._judge(dataclasses.replace(pong, boot=self._boot), prompt, now_ms)


class IgnoresKnown(Health):
    def on_pong(self, pong: Pong, now_ms: int) -> None:
        super().on_pong(dataclasses.replace(pong, known=True), now_ms)


class IgnoresDraining(Health):
    def on_pong(self, pong: Pong, now_ms: int) -> None:
        super().on_pong(dataclasses.replace(pong, ready=True), now_ms)


class IgnoresTheConnection(Health):
    def on_disconnected(self, now_ms: int) -> None:
        pass


class IgnoresRefusals(Health):
    def on_forgotten(self, now_ms: int) -> None:
        pass


class CountsSeconds(Health):
    """Silence is time, not pings: our own stall accuses the server."""

    heard_ms = 0

    def on_pong(self, pong: Pong, now_ms: int) -> None:
        self.heard_ms = now_ms
        super().on_pong(pong, now_ms)

    def on_tick(self, now_ms: int) -> None:
        if self.state is State.SUSPECT and now_ms - self.heard_ms > self._timing.hang_found_within_ms:
            self._fail("3 pings unanswered", now_ms)
        super().on_tick(now_ms)


class BelievesTheLastPingOnly(Health):
    """Whoever answers slower than the pings follow each other looks dead."""

    def on_pong(self, pong: Pong, now_ms: int) -> None:
        if pong.seq == self._seq:
            super().on_pong(pong, now_ms)


class CountsOneShort(Health):
    def on_tick(self, now_ms: int) -> None:
        lost = [sent_ms for _, sent_ms in self._unanswered if now_ms - sent_ms >= self._timing.timeout_ms]
        if len(lost) == self._timing.fail_after - 1 and self.state is State.SUSPECT:
            self._fail("3 pings unanswered", now_ms)
        super().on_tick(now_ms)


class UsesASuspect(Health):
    @property
    def usable(self) -> bool:
        return self.state in (State.HEALTHY, State.SUSPECT)


class UsesWhileRegistering(Health):
    @property
    def usable(self) -> bool:
        return self.state in (State.HEALTHY, State.RECOVERING)


class SleepsThroughTheTimeout(Health):
    @property
    def wake_at_ms(self) -> int:
        return self._ping_at_ms


class WaitsForEverToRegister(Health):
    def _recover(self, why: str, boot: int, now_ms: int) -> None:
        super()._recover(why, boot, now_ms)
        self._recover_until_ms = NEVER_MS


class RegistersTwiceAtOnce(Health):
    """Each attempt that was given up leaves a thread behind."""

    def on_pong(self, pong: Pong, now_ms: int) -> None:
        self._registering = False
        super().on_pong(pong, now_ms)
        self._registering = True


class AcceptsALateRegistration(Health):
    def on_recovered(self, attempt: int, boot: int, why_not: str, now_ms: int) -> None:
        if self.state is State.DEGRADED:
            self._become(State.RECOVERING, "late", now_ms)
        super().on_recovered(attempt, boot, why_not, now_ms)


class KeepsOldPings(Health):
    """Those that asked about the registration before."""

    def on_recovered(self, attempt: int, boot: int, why_not: str, now_ms: int) -> None:
        unanswered = list(self._unanswered)
        super().on_recovered(attempt, boot, why_not, now_ms)
        self._unanswered = unanswered


class NeverHolds(Health):
    def _hold(self, now_ms: int) -> None:
        pass


class HoldsLongerAndLonger(Health):
    """Without a bound."""

    def _hold(self, now_ms: int) -> None:
        hold_ms = self._hold_ms
        super()._hold(now_ms)
        self._hold_ms = 2 * hold_ms or self._hold_ms


class HoldsANewServer(Health):
    """For what the one before has done."""

    def on_pong(self, pong: Pong, now_ms: int) -> None:
        if self.state is not State.DEGRADED or now_ms >= self._hold_until_ms:
            super().on_pong(pong, now_ms)


class ForgivesAtOnce(Health):
    """One success in between, and a half-hung server costs a deadline each time."""

    def success_is_news(self, now_ms: int) -> bool:
        return self._hold_ms > 0


class UsesASlowServer(Health):
    def _judge(self, pong: Pong, prompt: bool, now_ms: int) -> None:
        super()._judge(pong, True, now_ms)


class GivesUpADeadServer(Health):
    def _degrade(self, why: str, now_ms: int) -> None:
        super()._degrade(why, now_ms)
        self._ping_at_ms = NEVER_MS


class AsksAtEveryConnection(Health):
    def on_connected(self, now_ms: int) -> None:
        self._ping_at_ms = min(self._ping_at_ms, now_ms)


class AsksWithoutAPause(Health):
    def _ping(self, now_ms: int) -> None:
        super()._ping(now_ms)
        self._ping_at_ms = now_ms


class AsksFasterThanItJudges(Health):
    """The newest ping is never old enough: a hang is not found while there are fewer others than it takes."""

    def _ping(self, now_ms: int) -> None:
        super()._ping(now_ms)
        self._ping_at_ms = now_ms + self._timing.interval_ms * 9 // 10


class JudgesBeforeListening(Heartbeat):
    def step(self) -> None:
        self.health.on_tick(self._clock())
        super().step()


class JudgesByALaterClock(Heartbeat):
    def step(self) -> None:
        assert self._link is not None
        for event in self._link.poll(max(0, self.health.wake_at_ms - self._clock())):
            self._on_event(event, self._clock())
        for _ in range(len(self._inbox)):
            self._inbox.popleft()(self._clock())
        self.health.on_tick(self._clock())
        self._act()


class CountsFromBeforeItSent(Heartbeat):
    def _act(self) -> None:
        before_ms = self._clock()
        self._clock()
        super()._act()
        self.health._unanswered = [(seq, min(at, before_ms)) for seq, at in self.health._unanswered]


class BelievesOldRefusals(Heartbeat):
    """Of operations that were sent under the session before."""

    def _take_forgotten(self, session: int, now_ms: int) -> None:
        self.health.on_forgotten(now_ms)


class ShutsTheGateLate(Heartbeat):
    def disappointed(self) -> None:
        self._say(self.health.on_disappointment)


class LeavesTheGateShut(Heartbeat):
    def _take_disappointment(self, now_ms: int) -> None:
        self.health.on_disappointment(now_ms)


class PingsWithoutASession(Heartbeat):
    def _act(self) -> None:
        membership, self.membership = self.membership, None
        super()._act()
        self.membership = membership
