"""Copy engines under test, all driven alike: the CPU's, CUDA's over simulated streams, CUDA's on a device."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch

from lmconnector.geometry import GroupLayout
from lmconnector.transfer import Transfer, new_transfer
from lmconnector.transfer.cuda import CudaTransfer
from paged import Case, bytes_of, regions_of
from streams import SimCuda

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and torch for it")


class CountedMemory:
    """In place of the driver: what is pinned; nothing may be under way when a piece is let go."""

    done = "pinned"
    advice = "none"

    def __init__(self, quiet: Callable[[], bool] = lambda: True) -> None:
        self.prepared: dict[int, int] = {}
        self._quiet = quiet

    def prepare(self, address: int, size_bytes: int) -> int:
        self.prepared[address] = size_bytes
        return 0

    def forget(self, address: int) -> int:
        assert self._quiet(), "a copy was under way"
        del self.prepared[address]
        return 0

    def explain(self, code: int) -> str:
        return f"error {code}"


class Rig:
    """Copies on a device, and an engine that computes there."""

    def __init__(self, regions: Sequence[torch.Tensor], groups: Sequence[GroupLayout]) -> None:
        self.regions = regions
        self.transfer: Transfer = new_transfer(regions, groups)

    def compute(self, work: Callable[[], object]) -> None:
        """As the engine would: on the CPU it is done at once, elsewhere enqueued."""
        work()

    def settle(self) -> None: ...

    def kv(self) -> list[bytes]:
        """What the engine's next kernel finds."""
        found: list[bytes] = []
        self.compute(lambda: found.extend(bytes_of(region) for region in self.regions))
        self.settle()
        return found

    def fill(self, kv: Sequence[torch.Tensor]) -> None:
        for region, data in zip(self.regions, kv, strict=True):
            self.compute(lambda region=region, data=data: region.copy_(data))


class SimRig(Rig):
    def __init__(
        self, regions: Sequence[torch.Tensor], groups: Sequence[GroupLayout], seed: int = 0,
        fail_after: int | None = None,
    ) -> None:  # fmt: skip
        self.regions = regions
        self.sim = SimCuda(Random(seed))
        self.memory = CountedMemory(lambda: not any(stream.queue for stream in self.lanes))
        self.transfer = CudaTransfer(
            regions, groups, self.sim, self.sim.enqueue(regions, fail_after), self.memory
        )  # fmt: skip
        self.lanes = [stream for stream in self.sim.streams if stream is not self.sim.compute]

    def compute(self, work: Callable[[], object]) -> None:
        self.sim.launch(work)

    def settle(self) -> None:
        self.sim.settle()


ENGINES = pytest.mark.parametrize("engine", ["cpu", "simulated", pytest.param("cuda", marks=NEEDS_CUDA)])


def rig_of(engine: str, case: Case) -> Rig:
    """With the case's content in its KV cache."""
    regions = regions_of(case.shape, case.kv(), "cuda" if engine == "cuda" else "cpu")
    if engine == "simulated":
        return SimRig(regions, case.shape.groups, case.seed)
    return Rig(regions, case.shape.groups)
