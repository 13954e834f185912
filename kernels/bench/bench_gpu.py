"""GPU kernels: checked against float64, then timed beside cuBLAS and torch's 2:4, in ten minutes.

    python kernels/bench/bench_gpu.py --out eval/reports/gpu     writes gpu.json and gpu.md
    python kernels/bench/bench_gpu.py --dry-run                  tiny, on the CPU, without a GPU

A case is a weight sparsity and a share of skipped inputs: W50A50; A50 has a dense weight, W50 skips
nothing. Weights are random, made on the device, and rotate over copies that exceed the second
cache; a CUDA graph holds at least 32 calls; figures are medians of replays with their 10th and 90th
percentile. Bytes are those of the channels that were read; "limit" is their share of the read
bandwidth measured in the same run. A step is all linears of a decode step of 32 layers with 8B's
shapes, without attention, in one graph. What fails its check stops the run; what there is no time
or package for is listed at the end.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, reference

Call = Callable[[], object]
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "down": (4096, 14336),
    "gate+up": (28672, 4096),
    "70B down": (8192, 28672),
}
CASES = ["A50", "W50", "W60", "W70", "W50A40", "W50A50", "W70A50"]
BATCHES = [1, 2, 4, 8, 16]
STEPS = ["W0", "A50", "W50", "W70", "W50A50", "W70A50"]
RING_BYTES = 2**29
CALLS = 32  # of a graph, at least


@dataclass(frozen=True)
class Setting:
    """Where and how large: a GPU, or the CPU with the interpreter for a dry run."""

    device: str
    shapes: dict[str, tuple[int, int]]
    cases: list[str]
    batches: list[int]
    steps: list[str]
    layers: int
    replays: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


REAL = Setting("cuda", SHAPES, CASES, BATCHES, STEPS, 32, 30)
DRY = Setting(
    "cpu", {"o": (40, 64), "gate+up": (48, 64)}, ["A50", "W50", "W50A50"], [1, 5],
    ["W0", "W50A50"], 2, 2, torch.float16,
)  # fmt: skip


@dataclass
class Run:
    """What was found so far, and until when to go on."""

    setting: Setting
    until: float
    about: dict[str, object]
    rows: list[dict[str, object]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def has_time(self, what: str) -> bool:
        left = time.monotonic() < self.until
        if not left:
            self.skipped.append(f"{what}: no time left")
        return left

    def add(self, **row: object) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def parse_case(case: str) -> tuple[float, float]:
    """W50A40 -> weight sparsity 0.5, skipped inputs 0.4."""
    match = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", case)
    if not case or match is None:
        raise SystemExit(f"case {case!r}: must look like W50A40, W50 or A50")
    pruned, skipped = (int(part or 0) / 100 for part in match.groups())
    return pruned, skipped


def seconds(calls: list[Call], setting: Setting) -> list[float]:
    """Seconds of a call in each replay of a graph of all of them, in their order."""
    if not setting.on_gpu:
        begun = time.perf_counter()
        for call in calls:
            call()
        return [(time.perf_counter() - begun) / len(calls)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:3]:  # compiles
            call()
    side.synchronize()
    many = calls * -(-CALLS // len(calls))
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in many:
            call()
    for i in range(setting.replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3 / len(many))
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in microseconds."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    named = {"us": statistics.median(times), "us_p10": cuts[0], "us_p90": cuts[8]}
    return {name: round(value * 1e6, 3) for name, value in named.items()}


def ring(count_bytes: int, setting: Setting) -> int:
    """Copies of a weight, so that together they exceed the second cache."""
    return max(3, -(-RING_BYTES // count_bytes)) if setting.on_gpu else 2


def random_weight(O: int, I: int, pruned: float, setting: Setting) -> Tensor:
    weight = torch.randn(O, I, device=setting.device) / I**0.5
    keep = torch.rand(O, I, device=setting.device) >= pruned
    return torch.where(keep, weight, 0).to(setting.dtype)


def form(weight: Tensor, pruned: float) -> ChannelWeight:
    """Packed, or dense in channel-major order."""
    O, I = weight.shape
    if pruned:
        return gpu_layout.pack_channels(reference.pack(weight), gpu.choose_tile(O))
    return ChannelWeight(weight.T.contiguous(), None, O, I, gpu.DENSE_BLOCK)


def limits(x: Tensor, skipped: float) -> Tensor:
    """Thresholds that skip a share of each row's inputs."""
    if not skipped:
        return torch.full((len(x),), -1.0, device=x.device)
    return x.float().abs().quantile(skipped, 1)


def product(x: Tensor, weight: ChannelWeight, thresholds: Tensor, skipped: float) -> Tensor:
    if not skipped:
        return gpu.channel_linear(x, weight, None)
    return gpu.listed_linear(gpu.list_channels(x, thresholds, None), weight, None)


def read_bytes(weight: ChannelWeight, active_I: Tensor) -> int:
    """Of the segments or columns of the active channels."""
    if weight.starts is None:
        return int(active_I.sum()) * weight.out_features * weight.data.element_size()
    units = weight.starts.diff().reshape(weight.tiles, -1)[:, active_I]
    return int(units.sum()) * gpu_layout.UNIT


def errors(y: Tensor, x: Tensor, weight: Tensor) -> tuple[float, float]:
    """Largest errors of y and of torch's product against float64."""
    exact = F.linear(x.double(), weight.double())
    plain = F.linear(x, weight)
    return float((y - exact).abs().max()), float((plain - exact).abs().max())


def check(y: Tensor, x: Tensor, weight: Tensor, what: str) -> float:
    """Our error over torch's. Stops the run where it is more than twice torch's."""
    ours, plain = errors(y, x, weight)
    unit = torch.finfo(y.dtype).eps * float(F.linear(x.double(), weight.double()).abs().max())
    if not ours <= 2 * plain + unit:
        raise SystemExit(f"{what}: wrong by {ours:.3g}, torch by {plain:.3g}: nothing is timed")
    return ours / max(plain, unit)


def check_kernels(run: Run) -> None:
    """Every kernel on odd shapes and new inputs; the same bits twice; no output left out."""
    setting = run.setting
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    checks = 0
    for O, I in ((33, 131), (700, 384)) if setting.on_gpu else ((33, 70),):
        for rows in setting.batches:
            for pruned, skipped in ((0.5, 0.0), (0.5, 0.5), (0.9, 0.9), (0.0, 0.5)):
                weight, x = random_weight(O, I, pruned, setting), random_inputs(rows, I, setting)
                thresholds, stored = limits(x, skipped), form(weight, pruned)
                y = product(x, stored, thresholds, skipped)
                kept = torch.where(reference.counting(x, thresholds, None), x, 0)
                check(y, kept, weight, f"{O}x{I} rows {rows} {pruned} {skipped}")
                if not torch.equal(y, product(x, stored, thresholds, skipped)):
                    raise SystemExit(f"{O}x{I} rows {rows}: two runs differ")
                if pruned and not torch.equal(gpu.dense_columns(stored)[:, :O].T, weight):
                    raise SystemExit(f"{O}x{I}: unpacking is not exact")
                checks += 1
    torch.use_deterministic_algorithms(False)
    run.add(kind="check", checks=checks)


def random_inputs(rows: int, I: int, setting: Setting) -> Tensor:
    return torch.randn(rows, I, device=setting.device).to(setting.dtype)


def bandwidth(run: Run) -> float:
    """Bytes per second of a sum over memory that no cache holds."""
    size = 2**30 if run.setting.on_gpu else 2**16
    buffers = [torch.ones(size // 4, device=run.setting.device) for _ in range(2)]
    calls: list[Call] = [lambda buffer=buffer: buffer.sum() for buffer in buffers]  # type: ignore[misc]
    times = seconds(calls, run.setting)
    run.add(kind="read", gb_per_s=round(size / statistics.median(times) / 1e9, 1))
    return size / statistics.median(times)


def copies(weight: ChannelWeight, setting: Setting) -> list[ChannelWeight]:
    count = ring(weight.nbytes, setting)
    return [replace(weight, data=weight.data.clone()) for _ in range(count)]


def dense_times(O: int, I: int, rows: int, run: Run) -> list[float]:
    weight, x = random_weight(O, I, 0, run.setting), random_inputs(rows, I, run.setting)
    many = [weight.clone() for _ in range(ring(weight.nbytes, run.setting))]
    return seconds([lambda w=w: F.linear(x, w) for w in many], run.setting)  # type: ignore[misc]


def bench_products(run: Run, read: float) -> None:
    """Each shape, batch and case beside the dense product."""
    for rows in run.setting.batches:
        for name, (O, I) in run.setting.shapes.items():
            if not run.has_time(f"products {name} at batch {rows}"):
                continue
            plain = statistics.median(dense_times(O, I, rows, run))
            weight_bytes = O * I * run.setting.dtype.itemsize
            limit = round(weight_bytes / read / plain, 3)
            about = {"kind": "product", "shape": name, "rows": rows}
            run.add(**about, case="dense", us=round(plain * 1e6, 3), limit=limit)
            for case in run.setting.cases:
                bench_case(run, about, (O, I), case, plain, read)
            bench_2_of_4(run, about, (O, I), plain)


def bench_case(
    run: Run,
    about: dict[str, object],
    shape: tuple[int, int],
    case: str,
    plain: float,
    read: float,
) -> None:
    (pruned, skipped), setting = parse_case(case), run.setting
    weight = random_weight(*shape, pruned, setting)
    x = random_inputs(int(str(about["rows"])), shape[1], setting)
    thresholds, stored = limits(x, skipped), form(weight, pruned)
    counted = reference.counting(x, thresholds, None)
    y = product(x, stored, thresholds, skipped)
    error = check(y, torch.where(counted, x, 0), weight, f"{about} {case}")
    many = copies(stored, setting)
    calls: list[Call] = [lambda w=w: product(x, w, thresholds, skipped) for w in many]  # type: ignore[misc]
    times = seconds(calls, setting)
    loaded = read_bytes(stored, counted.any(0))
    middle = statistics.median(times)
    run.add(
        **about,
        case=case,
        **spread(times),
        speedup=round(plain / middle, 3),
        bytes=loaded,
        limit=round(loaded / read / middle, 3),
        error=round(error, 3),
    )


def bench_2_of_4(run: Run, about: dict[str, object], shape: tuple[int, int], plain: float) -> None:
    """torch's semi-structured product, at the 8 rows that it needs at least."""
    weight = random_weight(*shape, 0, run.setting)
    weight[:, 2::4] = 0
    weight[:, 3::4] = 0
    try:
        from torch.sparse import to_sparse_semi_structured

        half = to_sparse_semi_structured(weight)
        x = random_inputs(max(8, int(str(about["rows"]))), shape[1], run.setting)
        times = seconds([lambda: F.linear(x, half)], run.setting)
    except Exception as error:  # a peer that this torch or GPU lacks is no reason to stop
        note = f"torch 2:4: {type(error).__name__} {str(error).splitlines()[0][:120]}"
        if note not in run.skipped:
            run.skipped.append(note)
        return
    speedup = round(plain / statistics.median(times), 3)
    run.add(**about, case="torch 2:4", **spread(times), speedup=speedup)


Layer = tuple[ChannelWeight, ChannelWeight, ChannelWeight, ChannelWeight]


def step_shapes(setting: Setting) -> list[tuple[int, int]]:
    """qkv, o, gate above up, down."""
    if setting.on_gpu:
        return [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    return [(96, 64), (64, 64), (80, 64), (64, 40)]


def sparse_step(x: Tensor, layers: list[Layer], thresholds: Tensor) -> Tensor:
    """The linears of a decode step; lists are made once for what shares an input."""
    for qkv, o, gate_up, down in layers:
        heads = gpu.listed_linear(gpu.list_channels(unit(x), thresholds, None), qkv, None)
        heads = heads[:, : o.in_features].contiguous()
        x = x + gpu.listed_linear(gpu.list_channels(heads, thresholds, None), o, None)
        channels = gpu.list_channels(unit(x), thresholds, None)
        _, following = gpu.listed_swiglu(channels, gate_up, None, thresholds, None)
        assert following is not None
        x = x + gpu.listed_linear(following, down, None)
    return x


def dense_step(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    for qkv, o, gate_up, down in layers:
        x = x + F.linear(F.linear(unit(x), qkv)[:, : o.shape[1]], o)
        gate, up = F.linear(unit(x), gate_up).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, down)
    return x


def unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def bench_steps(run: Run) -> None:
    setting = run.setting
    shapes, plain = step_shapes(setting), 0.0
    x = random_inputs(1, shapes[0][1], setting)
    for case in setting.steps:
        if not run.has_time(f"step {case}"):
            continue
        pruned, skipped = parse_case(case)
        threshold = float(torch.erfinv(torch.tensor(skipped))) * 2**0.5 if skipped else -1.0
        thresholds = torch.full((1,), threshold, device=setting.device)
        if not pruned and not skipped:
            dense = [[random_weight(*s, 0, setting) for s in shapes] for _ in range(setting.layers)]
            times = seconds([lambda w=dense: dense_step(x, w)], replace(setting, replays=10))  # type: ignore[misc]
            plain = statistics.median(times)
            compiled_step(run, x, dense)
            del dense
        else:
            layers = [sparse_layer(shapes, pruned, setting) for _ in range(setting.layers)]
            times = seconds(
                [lambda w=layers, t=thresholds: sparse_step(x, w, t)],  # type: ignore[misc]
                replace(setting, replays=10),
            )
            del layers
        speedup = round(plain / statistics.median(times), 3) if plain else None
        run.add(kind="step", case=case, layers=setting.layers, **spread(times), speedup=speedup)


def sparse_layer(shapes: list[tuple[int, int]], pruned: float, setting: Setting) -> Layer:
    qkv, o, gate_up, down = (form(random_weight(*s, pruned, setting), pruned) for s in shapes)
    return qkv, o, gate_up, down


def compiled_step(run: Run, x: Tensor, dense: list[list[Tensor]]) -> None:
    """The dense step as torch.compile makes it: what a speed-up has to beat."""
    if not run.setting.on_gpu:
        return
    try:
        step = torch.compile(dense_step, fullgraph=True, dynamic=False)
        times = seconds([lambda: step(x, dense)], replace(run.setting, replays=10))
    except Exception as error:  # as above: a peer
        run.skipped.append(f"compiled dense step: {type(error).__name__} {str(error)[:120]}")
        return
    run.add(kind="step", case="dense, compiled", layers=run.setting.layers, **spread(times))


def about(setting: Setting) -> dict[str, object]:
    found: dict[str, object] = {
        "torch": torch.__version__,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(sys.argv),
    }
    if not setting.on_gpu:
        return {"device": "none: dry run", **found}
    properties = torch.cuda.get_device_properties(0)
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "kernels": gpu.implementation(device),
        **found,
    }


def markdown(run: Run) -> Iterator[str]:
    yield f"# GPU kernels: {run.about['device']}"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in run.about.items())
    yield ""
    yield "| | case | batch | us (p10 to p90) | over dense | share of read bandwidth | error |"
    yield "|---|---|---|---|---|---|---|"
    for row in run.rows:
        if row["kind"] not in ("product", "step"):
            continue
        name = row.get("shape", f"linears of {row.get('layers')} layers")
        between = f" ({row['us_p10']} to {row['us_p90']})" if "us_p10" in row else ""
        cells = (row.get(key, "") for key in ("speedup", "limit", "error"))
        ends = " | ".join(str(cell) for cell in cells)
        yield f"| {name} | {row['case']} | {row.get('rows', 1)} | {row['us']}{between} | {ends} |"
    yield ""
    yield "Error: largest against float64, over that of torch's dense product."
    for note in run.skipped or ["nothing"]:
        yield f"- left out: {note}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="path without its ending")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, interpreted")
    options = parser.parse_args(arguments)
    setting = DRY if options.dry_run else REAL
    if setting.on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry-run tries the script without one")
    if gpu.native() != setting.on_gpu:
        raise SystemExit("a dry run needs TRITON_INTERPRET=1, a GPU must not have it")
    torch.manual_seed(0)
    run = Run(setting, time.monotonic() + options.seconds, about(setting))
    check_kernels(run)
    read = bandwidth(run)
    bench_products(replace_batches(run, 1), read)
    bench_steps(run)
    bench_products(replace_batches(run, 2), read)
    write(run, options.out)


def replace_batches(run: Run, least: int) -> Run:
    """The same run for batch 1, or for the larger ones: what matters most is measured first."""
    batches = [b for b in run.setting.batches if (b == 1) == (least == 1)]
    return replace(run, setting=replace(run.setting, batches=batches))


def write(run: Run, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {"about": run.about, "rows": run.rows, "skipped": run.skipped}
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(markdown(run)) + "\n")


if __name__ == "__main__":
    main()
