"""How long a product takes on a GPU by arithmetic: bytes, instructions, latencies and launches.

A product takes as long as its slowest resource: the bytes that memory moves, the instructions that
the multiprocessors issue, or the words of their shared memory; and what no resource hides: the
reads that wait for each other before the first weight arrives, the second kernel that adds the
splits, the list of channels, and the gaps between the nodes of a CUDA graph. What a GPU reaches of
a resource is an estimate with a lower and an upper end.

Everything is in seconds, bytes and instructions of a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prune_llm_kernels import gpu
from prune_llm_kernels.gpu_ops import CHUNK

LIST, PRODUCTS = "list_channels", ("packed_linear", "packed_matmul", "dense_linear", "mm")
FINISH = ("finish_linears", "finish_swiglu")


@dataclass(frozen=True)
class Device:
    """An H200 as notes and look-ups give it; the report says from where.

    Attributes:
        bandwidth: bytes a second that are read, measured by others; of a sheet's ``peak``.
        issue: instructions of threads a clock and multiprocessor.
        memory, cache: seconds until a read comes back from memory, and from the second cache;
            cache_bandwidth: bytes a second that the second cache reads.
        gap: seconds between two nodes of a graph. small: of a kernel that hardly reads anything.
    """

    peak: float = 4.8e12
    bandwidth: float = 4.3e12
    multiprocessors: int = 132
    clock: float = 1.98e9
    issue: int = 128
    memory: float = 0.6e-6
    cache: float = 0.15e-6
    cache_bandwidth: float = 5.0e12
    gap: float = 1.3e-6
    small: float = 0.7e-6

    @property
    def cycles(self) -> float:
        """Of all multiprocessors a second."""
        return self.multiprocessors * self.clock


@dataclass(frozen=True)
class Reached:
    """Shares of a resource: cuBLAS's of the bandwidth, ours of it, and ours of the instructions."""

    dense: float
    memory: float
    issue: float


LIKELY = Reached(0.90, 0.88, 0.85)
LOW = Reached(0.92, 0.80, 0.75)  # cuBLAS good, ours bad
HIGH = Reached(0.85, 0.92, 0.95)


@dataclass(frozen=True)
class Counts:
    """Of a compiled kernel's inner loop, for each weight position of a thread.

    Attributes:
        shared: reads of shared memory and shuffles.
    """

    instructions: float
    shared: float = 0.0


@dataclass(frozen=True)
class Product:
    """One sparse product as the kernels run it.

    Attributes:
        moved: bytes from memory. positions: weights whose mask or value is looked at.
        balance: share of the multiprocessors' time that a grid leaves them busy.
        splits: partial sums of ``outputs`` that the second kernel adds.
        latency: seconds of reads that wait for each other.
    """

    moved: int
    positions: int
    counts: Counts
    balance: float
    splits: int
    outputs: int
    latency: float
    listed: bool

    def bounds(self, device: Device, reached: Reached) -> dict[str, float]:
        """Seconds that each resource takes."""
        issued = self.positions * self.counts.instructions / (device.issue * device.cycles)
        words = self.positions * self.counts.shared / (32 * device.cycles)
        busy = reached.issue * self.balance
        return {
            "bytes": self.moved / (device.bandwidth * reached.memory),
            "instructions": issued / busy,
            "shared memory": words / busy,
        }

    def stream(self, device: Device, reached: Reached) -> float:
        """Seconds of the product's own kernel."""
        return max(self.bounds(device, reached).values()) + self.latency

    def finish(self, device: Device) -> float:
        """Seconds of the kernel that adds the splits: eight reads at a time, then the next."""
        waiting = -(-(self.splits - 1) // 8) * device.cache
        return device.small + max(waiting, self.splits * self.outputs * 4 / device.cache_bandwidth)

    def seconds(self, device: Device, reached: Reached) -> float:
        """Alone: with its list, and the gaps before its kernels."""
        listing = device.gap + device.small if self.listed else 0.0
        kernels = self.stream(device, reached) + self.finish(device)
        return listing + 2 * device.gap + kernels


def chunks_each(O: int, I: int, device: Device) -> int:
    """Chunks that a program reads, as gpu.py launches it."""
    return gpu.chunks_per_split(_blocks(O), -(-I // CHUNK), device.multiprocessors)


def _blocks(O: int) -> int:
    return -(-O // gpu.DENSE_BLOCK)  # a packed weight's are as large


def balance(O: int, I: int, each: int, device: Device) -> float:
    """Mean over most of the chunks that a multiprocessor reads, programs being dealt in turn."""
    chunks = -(-I // CHUNK)
    firsts = range(0, chunks, each)
    sizes = [min(each, chunks - first) for first in firsts for _ in range(_blocks(O))]
    return dealt(sizes, device.multiprocessors)


def dealt(sizes: Sequence[int], processors: int) -> float:
    """Mean over most of the work that processors get, each part going to the least busy."""
    work = [0] * processors
    for size in sizes:
        work[work.index(min(work))] += size
    return sum(work) / processors / max(work)


def product(
    shape: tuple[int, int], moved: int, active: int, counts: Counts, listed: bool, dense: bool,
    device: Device,
) -> Product:  # fmt: skip
    """Args: active: channels that are read. dense: the weight, of which columns are skipped."""
    O, I = shape
    each = chunks_each(O, I, device)
    # count and list lie in the cache; starts, then segments, come from memory
    latency = 2 * device.cache * listed + device.memory * (1 if dense else 2)
    positions = _blocks(O) * gpu.DENSE_BLOCK * active
    even, splits = balance(O, I, each, device), -(-I // CHUNK // each)
    return Product(moved, positions, counts, even, splits, O, latency, listed)


def best_grid(one: Product, I: int, device: Device, reached: Reached) -> Product:
    """The same product with the chunks a program that would be fastest, of those that leave every
    multiprocessor two programs: fewer would not keep enough reads under way."""
    chunks, found = -(-I // CHUNK), one
    for each in range(1, chunks + 1):
        splits = -(-chunks // each)
        if splits * _blocks(one.outputs) < 2 * device.multiprocessors:
            break
        even = balance(one.outputs, I, each, device)
        other = replace(one, splits=splits, balance=even)
        if other.seconds(device, reached) < found.seconds(device, reached):
            found = other
    return found


def dense_stream(shape: tuple[int, int], itemsize: int, device: Device, reached: Reached) -> float:
    """Seconds of cuBLAS's kernel."""
    O, I = shape
    return O * I * itemsize / (device.bandwidth * reached.dense) + device.memory


def step_seconds(
    launches: Sequence[str],
    streams: Sequence[float],
    finishes: Sequence[float],
    cache_seconds: float,
    device: Device,
) -> float:
    """A whole step: every node's gap, its products and what finishes them, attention's cache, and
    of every other kernel what a small one takes."""
    small = [n for n in launches if n not in PRODUCTS and n not in FINISH]
    assert len(launches) - len(small) == len(streams) + len(finishes)
    own = sum(streams) + sum(finishes) + cache_seconds
    return len(launches) * device.gap + len(small) * device.small + own


def improved(products: Mapping[str, Product], **changes: Any) -> dict[str, Product]:
    """The same products with some of their numbers replaced."""
    return {name: replace(one, **changes) for name, one in products.items()}
