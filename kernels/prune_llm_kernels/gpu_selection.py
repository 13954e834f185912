"""Which way a product takes on this GPU, by measurement: never one that is slower than dense.

The ways of a weight [O, I] for B rows:
    dense    torch's product with the dense weight
    listed   the dense weight, skipped inputs not read
    packed   the packed weight, every input
    joint    the packed weight, skipped inputs not read
A calibration at load times the ways in turn and keeps the fastest; what there was no time to
measure is dense. Choices are plain data for reports and statistics.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu
from prune_llm_kernels.channel_weight import ChannelWeight

DENSE = "dense"
MARGIN = 0.98  # of dense's time: what is not clearly faster is noise
SECONDS = 2.0
Call = Callable[[], object]
Key = tuple[int, int, int]  # O, I, B


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a shape and a batch.

    Attributes:
        seconds: medians by way; empty where nothing was measured.
    """

    out_features: int
    in_features: int
    rows: int
    way: str
    seconds: dict[str, float]

    def report(self) -> dict[str, object]:
        """For JSON, with the speed-up over dense."""
        gain = self.seconds[DENSE] / self.seconds[self.way] if self.seconds else 1.0
        return {**asdict(self), "speedup": round(gain, 3)}


def ways(
    x_BI: Tensor, dense_OI: Tensor, packed: ChannelWeight, thresholds_B: Tensor | None = None
) -> dict[str, Call]:
    """A call for each way; without thresholds no input is skipped.

    The list of channels is made inside the calls: one linear pays for it alone, where a model
    shares it between linears of one input.
    """
    calls: dict[str, Call] = {
        DENSE: lambda: F.linear(x_BI, dense_OI),
        "packed": lambda: gpu.channel_linear(x_BI, packed, None),
    }
    if thresholds_B is None:
        return calls
    columns = ChannelWeight(
        dense_OI.T.contiguous(), None, packed.out_features, packed.in_features, packed.tile
    )

    def over(weight: ChannelWeight) -> Tensor:
        return gpu.listed_linear(gpu.list_channels(x_BI, thresholds_B, None), weight, None)

    return calls | {"listed": lambda: over(columns), "joint": lambda: over(packed)}


def choose(seconds: Mapping[str, float]) -> str:
    """The fastest way; dense unless another is clearly faster."""
    fastest = min(seconds, key=lambda way: seconds[way])
    return fastest if seconds[fastest] < MARGIN * seconds[DENSE] else DENSE


def calibrate(
    cases: Mapping[Key, Callable[[], Mapping[str, Call]]],
    timer: Callable[[Call], float] | None = None,
    limit: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Key, Choice]:
    """Choose for each shape and batch.

    Args:
        cases: what makes the calls of a case; called when the case is measured, so that only its
            weights are in memory.
        timer: seconds of a call; None: `device_seconds`.
        limit: seconds for all of it; each case has an equal share of what is left.
    """
    timer = timer or device_seconds
    begun, chosen = clock(), {}
    for done, (key, make) in enumerate(cases.items()):
        left = limit - (clock() - begun)
        seconds = {}
        if left > 0:
            seconds = measure(make(), timer, left / (len(cases) - done), clock)
        chosen[key] = Choice(*key, choose(seconds) if seconds else DENSE, seconds)
    return chosen


def measure(
    calls: Mapping[str, Call],
    timer: Callable[[Call], float],
    limit: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Medians of the calls in turn, after one call of each that is not counted."""
    until = clock() + limit
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {way: [] for way in calls}
    while not all(times.values()) or (clock() < until and len(times[DENSE]) < 25):
        for way, call in calls.items():
            times[way].append(timer(call))
    return {way: statistics.median(found) for way, found in times.items()}


def device_seconds(call: Call) -> float:
    """Seconds of a call on the current CUDA device, its cache filled with other data."""
    _flush()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _flush() -> None:
    """Write more than the second cache holds, so that weights come from memory as in decode."""
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    torch.empty(2 * size, dtype=torch.uint8, device="cuda").zero_()
