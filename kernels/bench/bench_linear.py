"""Speed of the linear ops over shapes, densities, batches and threads, against torch's dense op.

    python kernels/bench/bench_linear.py                 the whole table (about ten minutes)
    python kernels/bench/bench_linear.py --quick         7B shapes, density 0.5 and 0.3, batch 1
    python kernels/bench/bench_linear.py --markdown table.md

Weights are rotated over copies that together exceed every cache; the implementations of a case and
the read bandwidth are timed in turn, round after round, and each figure is a median. "limit" is the
share of the byte limit: bytes of the weight / measured read bandwidth / time. An op whose result is
wrong is not timed: the run stops. The last line of the output is one JSON document.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import PackedWeight, cpu, dense_linear, reference, sparse_linear

# out_features x in_features: attention, MLP up and MLP down
SHAPES = {
    "1B": [(2048, 2048), (8192, 2048), (2048, 8192)],
    "7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "8B": [(1024, 4096), (14336, 4096), (4096, 14336)],
}
ROTATED_BYTES = 320 * 2**20
BANDWIDTH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, bandwidth in bytes per second."""

    out_features: int
    in_features: int
    pattern: str
    batch: int
    threads: int
    torch_seconds: float
    dense_seconds: float
    sparse_seconds: float
    packed_bytes: int
    dense_bytes: int
    bandwidth: float

    @property
    def sparse_limit(self) -> float:
        return self.packed_bytes / self.bandwidth / self.sparse_seconds

    @property
    def dense_limit(self) -> float:
        return self.dense_bytes / self.bandwidth / self.dense_seconds

    def markdown(self) -> str:
        return (
            f"| {self.out_features}x{self.in_features} | {self.pattern} | {self.batch} |"
            f" {self.threads} | {self.torch_seconds * 1e3:.3f} |"
            f" {self.torch_seconds / self.dense_seconds:.2f}x ({self.dense_limit:.2f}) |"
            f" {self.torch_seconds / self.sparse_seconds:.2f}x ({self.sparse_limit:.2f}) |"
            f" {self.bandwidth / 1e9:.1f} |"
        )


HEADER = (
    "| O x I | kept | batch | threads | torch dense ms | our dense (limit) | packed (limit) |"
    " read GB/s |\n|---|---|---|---|---|---|---|---|"
)


def keep_mask(pattern: str, O: int, I: int) -> Tensor:
    """ "0.5" keeps that share at random, "2:4" two of every four."""
    if ":" not in pattern:
        return torch.rand(O, I) < float(pattern)
    kept, group = (int(part) for part in pattern.split(":"))
    return (torch.rand(O, I // group, group).argsort(-1) < kept).reshape(O, I)


def make_weights(
    O: int, I: int, pattern: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[PackedWeight]]:
    """Dense weights and packed ones: enough copies of each to exceed the caches."""
    keep = keep_mask(pattern, O, I)
    weight = (torch.randn(O, I).abs() + 1).to(dtype) * keep  # no zero but the pruned
    packed = reference.pack(weight, fixed_count=":" in pattern)
    offsets = packed.offsets

    def copy() -> PackedWeight:
        return PackedWeight(
            packed.bitmask.clone(),
            packed.packed.clone(),
            None if offsets is None else offsets.clone(),
            I,
        )

    return (
        [weight.clone() for _ in range(max(3, ROTATED_BYTES // weight.nbytes))],
        [copy() for _ in range(max(3, ROTATED_BYTES // packed.nbytes))],
    )


def check(x: Tensor, dense: Tensor, packed: PackedWeight) -> None:
    """Stop unless our results are as accurate as torch's (at most twice its error)."""
    exact = F.linear(x.double(), dense.double())
    allowed = 2 * (F.linear(x, dense) - exact).abs().max()
    allowed += torch.finfo(x.dtype).eps * exact.abs().max()
    for name, y in (("dense", dense_linear(x, dense)), ("sparse", sparse_linear(x, packed))):
        error = (y - exact).abs().max()
        if not error <= allowed:
            raise SystemExit(
                f"{name}_linear is wrong by {error:.3g} (allowed {allowed:.3g}): not timed"
            )


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_case(
    x: Tensor, dense: list[Tensor], packed: list[PackedWeight], buffer: Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of each implementation and of one read of the buffer, interleaved."""
    # our dense op starts half a rotation away: torch has not just read the same copy
    away = len(dense) // 2
    calls: dict[str, Callable[[int], object]] = {
        "torch": lambda i: F.linear(x, dense[i % len(dense)]),
        "dense": lambda i: dense_linear(x, dense[(i + away) % len(dense)]),
        "sparse": lambda i: sparse_linear(x, packed[i % len(packed)]),
        "read": lambda i: cpu.read_all(buffer),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            elapsed = seconds(lambda call=call, i=i: call(i))  # type: ignore[misc]
            if i >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def bench(options: argparse.Namespace) -> Iterator[Row]:
    dtype = getattr(torch, options.dtype)
    buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
    for (O, I), pattern in itertools.product(options.shapes, options.patterns):
        dense, packed = make_weights(O, I, pattern, dtype)
        for threads, batch in itertools.product(options.threads, options.batches):
            torch.set_num_threads(threads)
            x = torch.randn(batch, I).to(dtype)
            check(x, dense[0], packed[0])
            times = time_case(x, dense, packed, buffer, options.rounds)
            yield Row(
                O,
                I,
                pattern,
                batch,
                threads,
                times["torch"],
                times["dense"],
                times["sparse"],
                packed[0].nbytes,
                dense[0].nbytes,
                buffer.nbytes / times["read"],
            )


def parse() -> argparse.Namespace:
    everything = torch.get_num_threads()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", nargs="+", help="O x I, such as 4096x4096; default: 1B, 7B and 8B shapes")
    add("--patterns", nargs="+", default=["0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "2:4"])
    add("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    add("--threads", nargs="+", type=int, default=sorted({1, everything}))
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--rounds", type=int, default=15, help="timed rounds per case")
    add("--quick", action="store_true", help="7B shapes, patterns 0.5, 0.3 and 2:4, batch 1")
    add("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    if options.quick:
        options.patterns, options.batches, options.threads = (
            ["0.5", "0.3", "2:4"],
            [1],
            [everything],
        )
    sizes = SHAPES["7B"] if options.quick else [s for group in SHAPES.values() for s in group]
    if options.shapes:
        pairs = [text.split("x") for text in options.shapes]
        sizes = [(int(outputs), int(inputs)) for outputs, inputs in pairs]
    options.shapes = sizes
    return options


def cpu_model() -> str:
    """The processor's name as the kernel of the system gives it."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    about = {
        "cpu": cpu_model(),
        "isa": cpu.isa_names()[cpu.isa_index()],
        "thread_pool": cpu.thread_pool_name(),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", *HEADER.split("\n")]
    print("\n".join(lines), flush=True)
    rows = []
    for row in bench(options):
        rows.append(row)
        lines.append(row.markdown())
        print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    print(json.dumps({**about, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
