"""Which way a product takes on this GPU, by measurement: never one that is slower than dense.

The ways of a weight [O, I] for B rows, all with the same result:
    dense    torch's product with a dense copy of the weight, inputs that do not count set to zero
    packed   the packed weight, every channel read
    joint    the packed weight, skipped channels not read
    listed   a dense weight in channel order, skipped channels not read
    2:4      torch's semi-structured product, for weights that are 2:4
A calibration at load times the ways in turn and keeps the fastest; what there was no time to
measure takes the sparse way and says that it was not measured. Choices are plain data for reports
and statistics.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prune_llm_kernels import gpu, gpu_layout, reference
from prune_llm_kernels.channel_weight import ChannelWeight
from prune_llm_kernels.gpu_ways import DENSE, JOINT, LISTED, PACKED, SEMI_STRUCTURED, Ways

MARGIN = 0.98  # of dense's time: what is not clearly faster is noise
SECONDS = 2.0
MOST = 25  # times that a way is timed
Call = Callable[[], object]
Key = tuple[int, int, int]  # O, I, B


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for a shape and a batch.

    Attributes:
        seconds: medians by way; empty where nothing was measured.
        note: why it is not the fastest, where it is not.
    """

    out_features: int
    in_features: int
    rows: int
    way: str
    seconds: dict[str, float]
    note: str = ""

    def report(self) -> dict[str, object]:
        """For JSON, with the speed-up over dense; None where nothing was measured."""
        gain = round(self.seconds[DENSE] / self.seconds[self.way], 3) if self.seconds else None
        found: dict[str, object] = {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "rows": self.rows,
            "way": self.way,
            "seconds": self.seconds,
            "speedup": gain,
        }
        return found | ({"note": self.note} if self.note else {})


def sparse_way(weight: ChannelWeight, gated: bool) -> str:
    """The way that needs no copy of a weight."""
    if weight.starts is None:
        return LISTED if gated else DENSE
    return JOINT if gated else PACKED


def ways(
    x_BI: Tensor, weight: ChannelWeight, copies: Ways, thresholds_B: Tensor | None = None
) -> dict[str, Call]:
    """A call for each way; without thresholds no input is skipped.

    The list of channels, or the zeros in its place, are made inside the calls: one linear pays for
    them alone, where a model shares them between linears of one input.
    """

    def kept() -> Tensor:
        if thresholds_B is None:
            return x_BI
        return torch.where(reference.counting(x_BI, thresholds_B, None), x_BI, 0)

    calls: dict[str, Call] = {DENSE: lambda: copies.product(DENSE, kept())}
    if copies.semi_OI is not None:
        calls[SEMI_STRUCTURED] = lambda: copies.product(SEMI_STRUCTURED, kept())
    if weight.starts is not None:
        calls[PACKED] = lambda: gpu.channel_linear(kept(), weight, None)
    if thresholds_B is not None:
        calls[sparse_way(weight, True)] = lambda: gpu.listed_linear(
            gpu.list_channels(x_BI, thresholds_B, None), weight, None
        )
    return calls


def copies_of(weight: ChannelWeight) -> Ways:
    """A dense copy of a weight, and one for 2:4 where it is and torch can: before any choice."""
    if weight.starts is None:
        return Ways(weight.out_features, weight.data[:, : weight.out_features], None, {})
    dense_OI = gpu_layout.unpack_channels(weight)
    semi_OI = None
    if weight.fixed_count and is_2_of_4(gpu_layout.channel_keep_mask(weight)):
        semi_OI = semi_structured(dense_OI)
    return Ways(weight.out_features, dense_OI.T.contiguous(), semi_OI, {})


def is_2_of_4(keep_OI: Tensor) -> bool:
    """Whether of every four consecutive inputs two are kept."""
    if keep_OI.shape[1] % 4:
        return False
    return bool((keep_OI.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def semi_structured(dense_OI: Tensor) -> Tensor | None:
    """As torch's 2:4 kernels take it; None where they do not take such a weight."""
    try:
        found: Tensor = torch.sparse.to_sparse_semi_structured(dense_OI)
    except (RuntimeError, NotImplementedError, ValueError):  # device, dtype, shape
        return None
    return found


def choose(seconds: Mapping[str, float]) -> str:
    """The fastest way; dense unless another is clearly faster."""
    fastest = min(seconds, key=lambda way: seconds[way])
    return fastest if seconds[fastest] < MARGIN * seconds[DENSE] else DENSE


def calibrate(
    cases: Mapping[Key, Callable[[], Mapping[str, Call]]],
    unmeasured: Callable[[Key], str],
    timer: Callable[[Call], float] | None = None,
    limit: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Key, Choice]:
    """Choose for each shape and batch.

    Args:
        cases: what makes the calls of a case; called when the case is measured, so that only its
            weights are in memory.
        unmeasured: the way of what there was no time for.
        timer: seconds of a call; None: `device_seconds`.
        limit: seconds of timing for all of it; each case has an equal share of what is left. What
            kernels take to compile, and copies to be made, is not part of it.
    """
    timer, left, chosen = timer or device_seconds, limit, dict[Key, Choice]()
    for done, (key, make) in enumerate(cases.items()):
        if left <= 0:
            chosen[key] = Choice(*key, unmeasured(key), {}, "no time was left to measure it")
            continue
        seconds, taken = measure(make(), timer, left / (len(cases) - done), clock)
        left -= taken
        chosen[key] = Choice(*key, choose(seconds), seconds)
    return chosen


def measure(
    calls: Mapping[str, Call],
    timer: Callable[[Call], float],
    limit: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[str, float], float]:
    """Medians of the calls in turn, and the seconds that took; each runs once before, untimed."""
    for call in calls.values():
        call()
    begun = clock()
    times: dict[str, list[float]] = {way: [] for way in calls}
    while not all(times.values()) or (clock() - begun < limit and len(times[DENSE]) < MOST):
        for way, call in calls.items():
            times[way].append(timer(call))
    medians = {way: statistics.median(found) for way, found in times.items()}
    return medians, clock() - begun


def without_copy(choice: Choice, way: str) -> Choice:
    """The choice where there is no memory for the copy that it needs."""
    note = f"{choice.way} is faster; there was no memory for a copy of the weights"
    return replace(choice, way=way, note=note)


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
