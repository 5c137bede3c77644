"""What goes wrong in the simulated world, and how often."""

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Faults:
    """Probabilities are per look of the heartbeat at its link, if nothing else is said."""

    delay_ms_max: int = 20
    loss: float = 0.0  # per message
    duplicate: float = 0.0  # per message
    garbage: float = 0.0
    crash: float = 0.0
    silent_crash: bool = False  # the connection's end is not seen
    down_ms_max: int = 5_000
    drop_connection: float = 0.0  # by a server that lives on
    forget: float = 0.0  # the server reaps our registration
    freeze: float = 0.0  # the server stops, then goes on
    freeze_ms_max: int = 8_000
    drain: float = 0.0
    hang_operations: float = 0.0  # pings are answered, operations are not
    hung_operation: float = 1.0  # per operation, while they hang
    stall: float = 0.0  # our own process stops, at any look at the clock: GIL, GC, SIGSTOP
    stall_ms_max: int = 6_000
    registration_ms_max: int = 20
    refuse: float = 0.0  # per registration
    hang_registration: float = 0.0  # per registration
    operation: float = 0.5
    disappoint: float = 0.0  # an operation of long ago runs into its deadline

    @classmethod
    def swarm(cls, rng: Random) -> "Faults":
        """Most runs have most faults off, so that rare pairs meet undisturbed."""

        def maybe(probability: float) -> float:
            return rng.choice((0.0, 0.0, probability, 4 * probability))

        return cls(
            delay_ms_max=rng.choice((1, 20, 20, 400, 2_500)),
            loss=maybe(0.05),
            duplicate=maybe(0.05),
            garbage=maybe(0.05),
            crash=maybe(0.02),
            silent_crash=rng.random() < 0.5,
            down_ms_max=rng.choice((1, 300, 5_000, 60_000)),
            drop_connection=rng.choice((0.0, 0.0, 0.02, 0.5)),
            forget=rng.choice((0.0, 0.0, 0.02, 0.8)),
            freeze=maybe(0.02),
            freeze_ms_max=rng.choice((200, 8_000)),
            drain=maybe(0.01),
            hang_operations=maybe(0.02),
            hung_operation=rng.choice((0.5, 1.0)),
            stall=maybe(0.01),
            stall_ms_max=rng.choice((50, 6_000)),
            registration_ms_max=rng.choice((1, 300, 4_000, 9_000)),
            refuse=rng.choice((0.0, 0.0, 0.2, 0.9)),
            hang_registration=maybe(0.05),
            operation=rng.choice((0.0, 0.1, 0.9)),
            disappoint=maybe(0.05),
        )

    def healed(self, delay_ms_max: int) -> "Faults":
        """Messages still take their time; nothing else is wrong."""
        return Faults(delay_ms_max=min(self.delay_ms_max, delay_ms_max), operation=self.operation)
