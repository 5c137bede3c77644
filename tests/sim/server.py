"""The simulated cache server, as far as the heartbeat can tell."""

import itertools
from typing import TYPE_CHECKING

from cache_server.protocol import messages as m
from lmconnector.heartbeat import Membership
from lmconnector.link import Connected, Disconnected

if TYPE_CHECKING:
    from sim.world import World

RECONNECT_MS_MAX = 200


class Server:
    def __init__(self, world: "World") -> None:
        self.session = 0  # the one it knows us by
        self.down = True
        self.draining = False
        self.connected = False
        self._world = world
        self._boot = 1
        self._boots = itertools.count(2)
        self._sessions = itertools.count(1)
        self._of_a_stranger = 0  # a session by which it knows somebody else
        self._operations_hang = False
        self._thaw_at_ms = 0

    @property
    def frozen(self) -> bool:
        return self._world.now_ms < self._thaw_at_ms

    @property
    def serves(self) -> bool:
        return not (self.down or self.frozen or self.draining)

    def ping(self, ping: m.Ping) -> None:
        if self.frozen and not self.down:
            self._world.at(self._thaw_at_ms, lambda: self.ping(ping))
        elif not self.down:
            pong = m.Pong(
                id=ping.id,
                seq=ping.seq,
                boot=self._boot,
                known=0 < ping.session in (self.session, self._of_a_stranger),
                state="draining" if self.draining else "ready",
                progress=0,
                silence_ms=0,
            )
            self._world.transmit(lambda: self._world.arrive(pong))

    def register(self) -> Membership | str:
        if self.down or self.frozen:
            return "no answer"
        if self.draining or self._world.chance(self._world.faults.refuse):
            return "refused"
        self.session = next(self._sessions)
        self._world.checkers.on_registered()
        return Membership(self.session, self._boot)

    def answers_operation(self) -> bool:
        hangs = self._operations_hang and self._world.chance(self._world.faults.hung_operation)
        return not (self.down or self.frozen or hangs)

    def forget(self) -> None:
        self.session = 0
        self._world.checkers.on_forgotten()

    def crash(self, down_ms: int) -> None:
        self.forget()
        self.down, self.draining, self._thaw_at_ms = True, False, 0
        self._world.at(self._world.now_ms + down_ms, self.start)
        if not self._world.faults.silent_crash:
            self.disconnect()

    def connect(self) -> None:
        self._world.at(self._world.now_ms + self._world.rng.randint(1, RECONNECT_MS_MAX), self._accept)

    def disconnect(self) -> None:
        if self.connected:
            self.connected = False
            self._world.arrive(Disconnected())

    def suffer(self) -> None:
        """Each of the faults has its chance."""
        world, faults, chance = self._world, self._world.faults, self._world.chance
        if not self.down and chance(faults.crash):
            self.crash(world.rng.randint(1, faults.down_ms_max))
        if chance(faults.forget):
            self.forget()
        if not self.frozen and chance(faults.freeze):
            self._thaw_at_ms = world.now_ms + world.rng.randint(1, faults.freeze_ms_max)
        if not self.down and not self.draining and chance(faults.drain):
            self.draining = True
            world.at(world.now_ms + world.rng.randint(1, 10_000), self._end_draining)
        if chance(faults.drop_connection):
            self.disconnect()
            self.connect()
        if chance(faults.hang_operations):
            self._operations_hang = not self._operations_hang

    def heal(self) -> None:
        self._thaw_at_ms = 0
        self._operations_hang = False

    def _accept(self) -> None:
        if not self.connected and not self.down:
            self.connected = True
            self._world.arrive(Connected())

    def start(self) -> None:
        self.down, self._operations_hang = False, False
        self._boot = next(self._boots)
        membership = self._world.heart.membership
        if membership is not None and self._world.chance(0.5):
            self._of_a_stranger = membership.session  # another boot, another numbering
        self._world.checkers.on_boot()
        self.connect()

    def _end_draining(self) -> None:
        if self.draining:
            self.crash(self._world.rng.randint(1, self._world.faults.down_ms_max))
