"""Copies between a paged KV cache and the arena: `python -m bench.transfer --out FILE.json [--quick]`.

Every figure is a share of the speed of one memmove of the same bytes, in turn with it in the same run.  Times
are those of the copying thread's CPU, which only copies: on a busy machine they still mean something.
"""

import argparse
import ctypes
import json
import mmap
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.kit import GIB, SHARED_MEMORY, bounded, machine, provenance, spread
from bench.picture import Chart, bar_of, picture
from lmconnector.geometry import GroupLayout
from lmconnector.transfer import Copy, new_transfer
from lmconnector.transfer.cpu import MappedMemory
from lmconnector.transfer.runs import Pages

KIB, MIB = 1 << 10, 1 << 20
PAGES_BYTES = (4 * KIB, 32 * KIB, 128 * KIB)
LAYERS, BLOCKS_PER_CHUNK = 16, 16
TARGET = 0.85
RUN = 4  # blocks that follow each other, in the order "runs"
TOTAL_BYTES = 256 * MIB  # far more than the last cache holds
DEADLINE_S = 900
Block = int


class Shape(NamedTuple):
    """What a chunk is made of."""

    layers: int
    page_bytes: int  # of one block in one layer
    blocks_per_chunk: int

    @property
    def chunk_bytes(self) -> int:
        return self.layers * self.page_bytes * self.blocks_per_chunk


# Chunks of 256 tokens in bfloat16, as one worker has them.  Bytes per token and layer: 2 (keys and values) x
# KV heads of the worker x head size x 2; with multi-head latent attention 576 x 2, in vLLM's blocks of 64.
MODELS = {
    "1B (Llama 3.2), blocks of 16": Shape(16, 16 * 2 * 8 * 64 * 2, 16),
    "1B (Llama 3.2), blocks of 128": Shape(16, 128 * 2 * 8 * 64 * 2, 2),
    "8B (Llama 3.1), blocks of 16": Shape(32, 16 * 2 * 8 * 128 * 2, 16),
    "8B (Llama 3.1), blocks of 128": Shape(32, 128 * 2 * 8 * 128 * 2, 2),
    "70B, 8 workers, blocks of 16": Shape(80, 16 * 2 * 1 * 128 * 2, 16),
    "70B, 8 workers, blocks of 128": Shape(80, 128 * 2 * 1 * 128 * 2, 2),
    "MLA (DeepSeek V3), blocks of 64": Shape(61, 64 * 576 * 2, 4),
}


def orders(blocks: int, rng: random.Random) -> dict[str, list[Block]]:
    """How the engine's pool hands out blocks: a fresh one, after a while, after a long while."""
    starts = list(range(0, blocks, RUN))
    rng.shuffle(starts)
    return {
        "one run": list(range(blocks)),
        f"runs of {RUN}": [block for start in starts for block in range(start, start + RUN)],
        "random": rng.sample(range(blocks), blocks),
    }


class Memory:
    """A KV cache of single layers, and as much of an arena in shared memory."""

    def __init__(self, shape: Shape, total_bytes: int) -> None:
        self.chunk_bytes, self.per_chunk = shape.chunk_bytes, shape.blocks_per_chunk
        self.chunks = total_bytes // self.chunk_bytes
        self.total_bytes = self.chunks * self.chunk_bytes
        self.blocks = self.chunks * self.per_chunk
        self.kv = torch.ones(shape.layers, self.blocks, shape.page_bytes, dtype=torch.uint8)
        with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
            file.truncate(self.total_bytes)
            self.arena = torch.frombuffer(mmap.mmap(file.fileno(), self.total_bytes), dtype=torch.uint8)
        self.arena.fill_(1)

    def copies(self, order: Sequence[Block]) -> list[Copy]:
        return [
            Copy(
                self.arena[chunk * self.chunk_bytes : (chunk + 1) * self.chunk_bytes],
                0,
                0,
                tuple(order[chunk * self.per_chunk : (chunk + 1) * self.per_chunk]),
            )
            for chunk in range(self.chunks)
        ]

    def memmove(self) -> None:
        ctypes.memmove(self.kv.data_ptr(), self.arena.data_ptr(), self.total_bytes)


def by_torch(regions: Sequence[torch.Tensor], copies: Sequence[Copy], *, to_kv: bool) -> None:
    """What was weighed and left: torch's own indexed copies."""
    for part, _group, _first, blocks in copies:
        rows, ids = part.view(len(regions), len(blocks), -1), torch.tensor(blocks)
        for region, row in zip(regions, rows, strict=True):
            if to_kv:
                region.index_copy_(0, ids, row)
            else:
                torch.index_select(region, 0, ids, out=row)


def by_memmove(regions: Sequence[torch.Tensor], copies: Sequence[Copy], *, to_kv: bool) -> None:
    """What was weighed and left: one memmove for each region and run of blocks."""
    groups = [GroupLayout(1, BLOCKS_PER_CHUNK, 0)]
    spans = Pages(regions[0].shape[0], [region.shape[1] for region in regions], groups).spans(copies)
    in_kv = np.array([region.data_ptr() for region in regions])[spans.region] + spans.in_region
    in_arena = np.array([copy.part.data_ptr() for copy in copies])[spans.copy] + spans.in_part
    targets, sources = (in_kv, in_arena) if to_kv else (in_arena, in_kv)
    for target, source, size in zip(targets.tolist(), sources.tolist(), spans.size.tolist(), strict=True):
        ctypes.memmove(target, source, size)


def shares(ways: dict[str, Callable[[], object]], reference: Callable[[], None], rounds: int) -> dict:
    """Of the reference's speed, in neighbouring turns; the first round is thrown away."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            expected, found = cpu_s(reference), cpu_s(way)
            if number:
                taken[name].append(expected / found)
    return {name: spread(values, 2) for name, values in taken.items()}


def cpu_s(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def measure_model(shape: Shape, rounds: int, total_bytes: int) -> dict:
    memory = Memory(shape, total_bytes)
    transfer = new_transfer(list(memory.kv), [GroupLayout(1, shape.blocks_per_chunk, 0)])
    figures: dict = {"page_kib": shape.page_bytes / KIB, "chunk_mib": round(memory.chunk_bytes / MIB, 1)}
    every = orders(memory.blocks, random.Random(1))
    for order in ("one run", "random"):
        copies = memory.copies(every[order])
        ways = {
            "load": lambda copies=copies: transfer.load(copies),
            "store": lambda copies=copies: transfer.store(copies),
        }
        figures[order] = shares(ways, memory.memmove, rounds)
    transfer.close()
    return figures


def measure(page_bytes: int, rounds: int, total_bytes: int) -> dict:
    memory = Memory(Shape(LAYERS, page_bytes, BLOCKS_PER_CHUNK), total_bytes)
    regions = list(memory.kv)
    transfer = new_transfer(regions, [GroupLayout(1, BLOCKS_PER_CHUNK, 0)])
    figures: dict = {"chunk_kib": memory.chunk_bytes // KIB}
    figures["memmove_gb_s"] = round(
        memory.total_bytes / statistics.median(cpu_s(memory.memmove) for _ in range(5)) / 1e9, 1
    )
    for order, blocks in orders(memory.blocks, random.Random(page_bytes)).items():
        copies = memory.copies(blocks)
        ways: dict[str, Callable[[], object]] = {
            "load": lambda copies=copies: transfer.load(copies),
            "store": lambda copies=copies: transfer.store(copies),
        }
        for name, way in (("memmove", by_memmove), ("torch", by_torch)):
            ways[f"load by {name}"] = lambda copies=copies, way=way: way(regions, copies, to_kv=True)
            ways[f"store by {name}"] = lambda copies=copies, way=way: way(regions, copies, to_kv=False)
        figures[order] = shares(ways, memory.memmove, rounds)
    transfer.close()
    return figures


def measure_descriptors(rounds: int) -> dict:
    """The arithmetic before a GPU's copies: a prompt of 32 chunks, 80 regions; no byte is moved."""
    figures = {}
    pages = Pages(1 << 16, [32 * KIB] * 80, [GroupLayout(16, BLOCKS_PER_CHUNK, 0)])
    part = torch.empty(0, dtype=torch.uint8)
    for order, blocks in orders(32 * BLOCKS_PER_CHUNK, random.Random(1)).items():
        copies = [Copy(part, 0, 0, tuple(blocks[at : at + 16])) for at in range(0, len(blocks), 16)]
        times = [cpu_s(lambda copies=copies: pages.spans(copies)) for _ in range(10 * rounds)]
        figures[order] = {
            "spans": len(pages.spans(copies).size),
            "us": round(statistics.median(times) * 1e6),
        }
    return figures


def measure_first_touch(total_bytes: int, rounds: int) -> dict:
    """The first copy through a fresh mapping, as a share of the second one's speed; attached or not."""
    kv = np.ones(total_bytes, np.uint8)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryFile(dir=SHARED_MEMORY) as file:
        file.write(kv.data)
        file.flush()
        for _ in range(rounds):
            for way in ("load", "store", "load attached", "store attached"):
                arena = np.frombuffer(mmap.mmap(file.fileno(), total_bytes), np.uint8)
                if way.endswith("attached"):
                    began = time.thread_time()
                    assert MappedMemory().prepare(arena.ctypes.data, total_bytes) == 0
                    per_gib_ms = (time.thread_time() - began) * 1e3 * GIB / total_bytes
                    found.setdefault("attach, ms per GiB", []).append(per_gib_ms)
                target, source = (kv, arena) if way.startswith("load") else (arena, kv)
                first, second = (
                    cpu_s(lambda target=target, source=source: np.copyto(target, source)) for _ in range(2)
                )
                found.setdefault(way, []).append(second / first)
    return {name: spread(values, 2) for name, values in found.items()}


def chart(report: dict) -> Chart:
    series = [f"{way}, {order}" for order in ("one run", "random") for way in ("load", "store")]
    groups = {
        name: [bar_of(figures[order][way]) for order in ("one run", "random") for way in ("load", "store")]
        for name, figures in report["models"].items()
    }
    note = f"{report['machine']['cpu']}, commit {report['commit'][:7]}; one memcpy of all the bytes: 1"
    return Chart(
        "Copies of chunks, as a share of memcpy's speed", "x", series, groups, target=TARGET, note=note
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--quick", action="store_true", help="one round and small sizes: a test of the bench")
    options = parser.parse_args()
    rounds, total_bytes = (1, 64 * MIB) if options.quick else (15, TOTAL_BYTES)
    torch.set_num_threads(1)
    report: dict = {"machine": machine(), **provenance(), "quick": options.quick, "pages": {}, "models": {}}
    with bounded(DEADLINE_S):
        report["descriptors"] = measure_descriptors(rounds)
        report["first touch"] = measure_first_touch(total_bytes, rounds)
        print(
            "first touch:",
            ", ".join(f"{name} {value['median']}" for name, value in report["first touch"].items()),
            file=sys.stderr,
        )
        for page_bytes in PAGES_BYTES:
            figures = report["pages"][f"{page_bytes // KIB} KiB"] = measure(page_bytes, rounds, total_bytes)
            print(
                f"\npages of {page_bytes // KIB} KiB, memmove {figures['memmove_gb_s']} GB/s", file=sys.stderr
            )
            for order, ways in figures.items():
                if isinstance(ways, dict):
                    found = "  ".join(f"{name} {way['median']:.2f}" for name, way in ways.items())
                    print(f"  {order:12} {found}", file=sys.stderr)
        for name, shape in MODELS.items():
            figures = report["models"][name] = measure_model(shape, rounds, total_bytes)
            print(f"\n{name}: {figures['page_kib']:g} KiB, {figures['chunk_mib']} MiB", file=sys.stderr)
            for order in ("one run", "random"):
                found = "  ".join(f"{way} {value['median']:.2f}" for way, value in figures[order].items())
                print(f"  {order:12} {found}", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".svg").write_text(picture(chart(report)))


if __name__ == "__main__":
    main()
