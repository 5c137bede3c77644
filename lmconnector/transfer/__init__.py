"""Copy engines between the engine's paged KV cache and the arena: `new_transfer` chooses one."""

from collections.abc import Sequence

import torch

from lmconnector.errors import UnsupportedError
from lmconnector.geometry import GroupLayout
from lmconnector.transfer.base import Copy, Ticket, Transfer
from lmconnector.transfer.cpu import CpuTransfer
from lmconnector.transfer.cuda import CudaTransfer

__all__ = ["Copy", "Ticket", "Transfer", "new_transfer"]


def new_transfer(regions: Sequence[torch.Tensor], groups: Sequence[GroupLayout]) -> Transfer:
    """`regions`: as `layout.block_regions` makes them, uint8 [blocks, page bytes] without gaps."""
    assert all(region.is_contiguous() and region.dtype == torch.uint8 for region in regions)
    assert len({region.shape[0] for region in regions}) == 1, "a block has a page in every region"
    devices = {str(region.device) for region in regions}
    kinds = {region.device.type for region in regions}
    if len(devices) == 1 and kinds == {"cpu"}:
        return CpuTransfer(regions, groups)
    if len(devices) == 1 and kinds == {"cuda"} and torch.version.hip is None:
        return CudaTransfer(regions, groups)
    raise UnsupportedError(
        f"the KV cache is on {', '.join(sorted(devices))}"
        f"{' with ROCm' if torch.version.hip else ''}: supported are the CPU and one CUDA device"
    )
