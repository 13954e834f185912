"""A run of the GPU benchmark: where and how large, its time, its timer and what it has found."""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from gpu_cases import LLAMA_8B, RANDOM, WANDA, Sizes

from prune_llm_kernels import gpu

Call = Callable[[], object]
Case = tuple[str, str]  # of gpu_cases, and the masks
RING_BYTES = 2**29
CALLS = 32  # of a graph, at least
GRACE = 30.0  # seconds that a section may take beyond its own, before it is stopped
BLOCK = tuple(LLAMA_8B.shapes)


@dataclass(frozen=True)
class Setting:
    """A GPU, or the CPU with the interpreter for a dry run.

    Attributes:
        cases: of products at batch 1; many: at larger ones; steps: of decode steps.
        distinct: layers of different weights, taken in turn.
        searched: runs that look for a step's thresholds.
        seconds: of each section.
    """

    device: str
    sizes: Sizes
    checked: Sizes
    cases: tuple[Case, ...]
    many: tuple[Case, ...]
    batches: tuple[int, ...]
    steps: tuple[Case, ...]
    contexts: tuple[int, ...]
    distinct: int
    replays: int
    searched: int
    seconds: dict[str, float]
    dtype: torch.dtype = torch.bfloat16
    more_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {**self.sizes.shapes, **self.more_shapes}


_ASKED: tuple[Case, ...] = (
    ("A50", RANDOM), ("W50", RANDOM), ("W70", RANDOM), ("W50A50", RANDOM), ("W50A50", WANDA),
)  # fmt: skip
REAL = Setting(
    "cuda",
    LLAMA_8B,
    Sizes(300, 700, 6, 2, 64, 500, 2),
    (*_ASKED, ("W60", RANDOM), ("W50A40", WANDA), ("W70A50", WANDA)),
    (("W50", RANDOM), ("W50A50", WANDA)),
    (1, 2, 4, 8, 16),
    _ASKED,
    (256, 4096),
    4,  # of them packed at 70 % and skipping half, over 300 MB
    30,
    14,
    {"check": 110, "read": 10, "products": 100, "peer": 130, "steps": 100, "batches": 60},
    more_shapes={"70B down": (8192, 28672)},
)
DRY = Setting(
    "cpu",
    Sizes(64, 256, 4, 4, 64, 96, 1),  # whose linears of one input lie together
    Sizes(48, 80, 4, 2, 16, 60, 2),
    (("A50", RANDOM), ("W50", RANDOM), ("W50A50", WANDA)),
    (("W50", RANDOM),),
    (1, 5),
    (("A50", RANDOM), ("W50A50", WANDA)),
    (16, 40),
    1,
    2,
    2,
    dict.fromkeys(("check", "read", "products", "peer", "steps", "batches"), 60.0),
    torch.float16,
)


class OutOfTime(BaseException):
    """A section takes too long; not an Exception, which a peer's failure is."""


@dataclass
class Run:
    """What was found so far, and until when to go on."""

    setting: Setting
    end: float
    about: dict[str, object]
    rows: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    _until: float = 0.0

    def has_time(self, what: str) -> bool:
        left = time.monotonic() < self._until
        if not left:
            self.leave_out(f"{what}: no time left")
        return left

    def leave_out(self, note: str) -> None:
        if note not in self.left_out:
            self.left_out.append(note)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Nothing is begun when its seconds are over; what still runs GRACE later is stopped.

        Sections do not nest.
        """
        begun = time.monotonic()
        self._until = min(begun + self.setting.seconds[name], self.end)
        # what is never begun need not be stopped
        signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, max(self._until - begun, 0.0) + GRACE)
        try:
            yield
        except OutOfTime:
            self.leave_out(f"the rest of {name}: stopped after {time.monotonic() - begun:.0f} s")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _stop(*_: object) -> None:
    raise OutOfTime


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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in many:
            call()
    times = event_seconds(graph.replay, setting)
    return [time / len(many) for time in times]


def event_seconds(call: Call, setting: Setting, before: Call | None = None) -> list[float]:
    """Of a call on the GPU, three times more than are counted; ``before`` each is not timed.

    Memory is filled first: the cache holds other data, and the host is done before the device is.
    """
    times, filled = [], torch.empty(RING_BYTES, dtype=torch.uint8, device=setting.device)
    for i in range(setting.replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is not None:
            before()
        filled.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in microseconds."""
    cuts = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    named = {"us": statistics.median(times), "us_p10": cuts[0], "us_p90": cuts[8]}
    return {name: round(value * 1e6, 3) for name, value in named.items()}


def ring(count_bytes: int, setting: Setting) -> int:
    """Copies of a weight, so that together they exceed the second cache."""
    return max(3, -(-RING_BYTES // count_bytes)) if setting.on_gpu else 2


def bandwidth(run: Run) -> float:
    """Bytes per second of a sum over memory that no cache holds."""
    size = 2**30 if run.setting.on_gpu else 2**16
    buffers = [torch.ones(size // 4, device=run.setting.device) for _ in range(2)]
    calls: list[Call] = [buffer.sum for buffer in buffers]
    times = seconds(calls, run.setting)
    read = size / statistics.median(times)
    run.add(kind="read", gb_per_s=round(read / 1e9, 1))
    return read


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
