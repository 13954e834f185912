"""Speed of channel-major products that skip zero weights and small inputs, beside torch's dense op.

    python kernels/bench/bench_channels.py                    the whole table (minutes)
    python kernels/bench/bench_channels.py --shapes 4096x4096 --cases W50A50
    python kernels/bench/bench_channels.py --markdown table.md

A case is a weight sparsity and a share of skipped inputs: W50A40 prunes 50 % and skips 40 %; A50 is
a dense weight. The list of channels is made inside the timed call, from inputs and a threshold.
A timing is of `--calls` products behind each other, as a decoding step has them, divided by their
number. Weights rotate over copies that exceed every cache; implementations and the read bandwidth
are timed in turn, figures are medians. "limit" is the share of the byte limit: bytes of the
channels that are read / measured bandwidth / time. "cores" is how much more arithmetic in the cache
all threads do than one: on a shared machine two may be one core for a while. A result that is wrong
is not timed: the run stops.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench_linear import BANDWIDTH_BYTES, ROTATED_BYTES, SHAPES, cpu_model, seconds
from cases import parse_case
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import ChannelWeight, cpu, reference, to_channels, tokens
from prune_llm_kernels.cpu_plan import CpuPlan
from prune_llm_kernels.plan import Gate

CASES = ["W50", "W50A25", "W50A40", "W50A50", "W70A50", "A50"]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, bandwidth in bytes per second."""

    out_features: int
    in_features: int
    case: str
    batch: int
    threads: int
    torch_seconds: float
    seconds: float
    read_bytes: float
    bandwidth: float
    cores: float

    @property
    def limit(self) -> float:
        return self.read_bytes / self.bandwidth / self.seconds

    def markdown(self) -> str:
        return (
            f"| {self.out_features}x{self.in_features} | {self.case} | {self.batch} |"
            f" {self.threads} | {self.torch_seconds * 1e3:.3f} |"
            f" {self.torch_seconds / self.seconds:.2f}x ({self.limit:.2f}) |"
            f" {self.bandwidth / 1e9:.1f} | {self.cores:.1f} |"
        )


HEADER = "| O x I | case | batch | threads | torch dense ms | ours (limit) | read GB/s | cores |"


def make_channels(weight: Tensor) -> list[ChannelWeight]:
    """Enough copies to exceed the caches; a weight without zeros stays dense."""
    pruned = bool((weight == 0).any())
    made = to_channels(reference.pack(weight) if pruned else weight)
    copies = [
        replace(made, data=made.data.clone()) for _ in range(max(3, ROTATED_BYTES // made.nbytes))
    ]
    for copy in copies:
        cpu.settle(copy.data)
    return copies


def make_plans(
    x: Tensor, copies: list[ChannelWeight], gate: Gate, out: Tensor, calls: int
) -> list[CpuPlan]:
    """For each copy a plan of `calls` products, with it and those behind it."""
    plans = []
    for first in range(len(copies)):
        plan = CpuPlan(x.dtype)
        for number in range(first, first + calls):
            plan.linears(x, [copies[number % len(copies)]], [None], [out], gate=gate)
        plans.append(plan)
    return plans


def check(x: Tensor, weight: Tensor, gate: Gate, plan: CpuPlan, out: Tensor) -> None:
    """Stop unless the result is as accurate as torch's (at most twice its error)."""
    gated = torch.where(reference.counting(x, gate.thresholds_B, None), x, 0)
    exact = F.linear(gated.double(), weight.double())
    plan.run()
    allowed = 2 * (F.linear(gated, weight) - exact).abs().max()
    allowed += torch.finfo(x.dtype).eps * exact.abs().max()
    error = (out - exact).abs().max()
    if not error <= allowed:
        raise SystemExit(f"channels are wrong by {error:.3g} (allowed {allowed:.3g}): not timed")


def cores(threads: int) -> float:
    """How much sooner all threads are done than one with arithmetic on what the caches hold.

    A little less than the cores they have: calls and waking take time as well.
    """
    gate, up = torch.randn(2, 160, 1024).bfloat16().unbind()

    def elapsed(count: int) -> float:
        torch.set_num_threads(count)
        tokens.silu_mul(gate, up)
        return seconds(lambda: [tokens.silu_mul(gate, up) for _ in range(15)])

    one, together = elapsed(1), elapsed(threads)
    return one / together


def bench_case(
    O: int, I: int, case: str, batch: int, calls: int, rounds: int, buffer: Tensor
) -> Row:
    pruned, skipped = parse_case(case)
    weight = (torch.randn(O, I).abs() + 1).bfloat16()  # no zero but the pruned
    dense = [weight.clone() for _ in range(max(3, ROTATED_BYTES // weight.nbytes))]
    weight = weight * (torch.rand(O, I) >= pruned)
    x = torch.randn(batch, I).bfloat16()
    threshold = x.float().abs().quantile(skipped, 1) if skipped else torch.full((batch,), -1.0)
    counts, out = torch.zeros(3, dtype=torch.int64), torch.empty(batch, O).bfloat16()
    gate = Gate(threshold, None, counts)
    copies = make_channels(weight)
    plans = make_plans(x, copies, gate, out, calls)
    check(x, weight, gate, plans[0], out)
    share = int(counts[0]) / calls / I
    timed: dict[str, Callable[[int], object]] = {
        "torch": lambda i: [F.linear(x, dense[n % len(dense)]) for n in range(i, i + calls)],
        "ours": lambda i: plans[i % len(plans)].run(),
        "read": lambda i: cpu.read_all(buffer),
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    threads, found = torch.get_num_threads(), []
    for i in range(rounds + 2):
        found.append(cores(threads))
        for name, call in timed.items():
            elapsed = seconds(lambda call=call, i=i: call(i * calls))  # type: ignore[misc]
            if i >= 2:
                times[name].append(elapsed)
    torch_seconds, ours, read = (statistics.median(times[name]) for name in timed)
    bytes_read = copies[0].nbytes * share
    bandwidth = buffer.nbytes / read
    return Row(
        O, I, case, batch, threads, torch_seconds / calls, ours / calls, bytes_read, bandwidth,
        statistics.median(found),
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--shapes", nargs="+", help="O x I, such as 4096x4096; default: 1B, 7B and 8B shapes")
    add("--cases", nargs="+", default=CASES)
    add("--batches", nargs="+", type=int, default=[1])
    add("--calls", type=int, default=32, help="products behind each other in a timing")
    add("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    add("--rounds", type=int, default=15, help="timed rounds per case")
    add("--markdown", type=Path, help="also write the table to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    shapes = [shape for group in SHAPES.values() for shape in group]
    if options.shapes:
        shapes = [(int(o), int(i)) for o, i in (text.split("x") for text in options.shapes)]
    about = {
        "cpu": cpu_model(),
        "isa": cpu.isa_names()[cpu.isa_index()],
        "torch": torch.__version__,
        "dtype": "bfloat16",
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", HEADER]
    lines.append("|---" * 8 + "|")
    print("\n".join(lines), flush=True)
    buffer, rows = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64), []
    for O, I in shapes:
        for case in options.cases:
            for threads in options.threads:
                torch.set_num_threads(threads)
                for batch in options.batches:
                    rows.append(
                        bench_case(O, I, case, batch, options.calls, options.rounds, buffer)
                    )
                    lines.append(rows[-1].markdown())
                    print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    print(json.dumps({**about, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
