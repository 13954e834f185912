"""One packed linear after another beside torch's dense: checked against float64, then timed.

What gives wrong results is not timed. Shape letters: B = rows, O = output features, I = input
features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_llm_eval.clock import clock, read_all, threads_on
from prune_llm_kernels import (
    ChannelWeight,
    PackedWeight,
    channel_linear,
    dense_linear,
    sparse_linear,
    unpack,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# weights of one kind that together fit a large cache are not read from memory
CACHED_BYTES = 96 * 2**20


@dataclass(frozen=True)
class LinearRow:
    """One kind of linear: seconds of a call, bytes of a weight, bytes read per second.

    ``threads`` is None on a GPU.
    """

    kind: str
    out_features: int
    in_features: int
    sparsity: float
    batch: int
    threads: int | None
    torch_seconds: float
    dense_seconds: float
    packed_seconds: float
    dense_bytes: int
    packed_bytes: int
    bandwidth: float
    cached: bool

    @property
    def limit(self) -> float:
        return self.packed_bytes / self.bandwidth / self.packed_seconds

    @property
    def speed_up(self) -> float:
        return self.torch_seconds / self.packed_seconds


Weight = PackedWeight | ChannelWeight
Pair = tuple[Weight, Tensor]


def kinds_of(packed: dict[str, Weight], dense: PreTrainedModel) -> dict[str, list[Pair]]:
    """Weights of every kind over all blocks: read in turn, none stays in a cache for long."""
    kinds: dict[str, list[Pair]] = {}
    for path, weight in packed.items():
        linear = dense.get_submodule(path)
        shape = (weight.out_features, weight.in_features)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
            raise ValueError(f"{path}: the dense model has no linear {list(shape)} of that name")
        kinds.setdefault(path.rpartition(".")[2], []).append((weight, linear.weight.detach()))
    return kinds


def check_linears(packed: Mapping[str, Weight]) -> None:
    """Every packed weight against float64; error at most twice that of torch's dense op."""
    for path, weight in packed.items():
        dense_OI = _unpacked(weight)
        x = torch.randn(1, weight.in_features).to(dense_OI)
        exact = x.double() @ dense_OI.double().T
        allowed = 2 * (F.linear(x, dense_OI) - exact).abs().max()
        allowed += torch.finfo(x.dtype).eps * exact.abs().max()
        error = (_product(x, weight) - exact).abs().max()
        if not error <= allowed:
            raise RuntimeError(
                f"{path}: wrong by {float(error):.3g}, allowed {float(allowed):.3g}; not timed"
            )


def time_linear(
    kind: str, pairs: Sequence[Pair], batch: int, rounds: int, buffer: Tensor
) -> LinearRow:
    """Medians over every weight of the kind, read one after the other, round after round."""
    first, dense_OI = pairs[0]
    x = torch.randn(batch, first.in_features).to(dense_OI)
    # one op over every weight, then the next op: what one has read the other finds no more
    ops: dict[str, list[Callable[[], object]]] = {
        "packed": [partial(_product, x, weight) for weight, _ in pairs],
        "torch": [partial(F.linear, x, weight_OI) for _, weight_OI in pairs],
        "dense": [partial(dense_linear, x, weight_OI) for _, weight_OI in pairs],
        "read": [partial(read_all, buffer)],
    }
    clocks = {name: clock(calls, x.device) for name, calls in ops.items()}
    times: dict[str, list[float]] = {name: [] for name in ops}
    for round_ in range(rounds + 1):
        for name, run in clocks.items():
            seconds = run()
            times[name] += seconds if round_ else []  # the first round warms up
    median = {name: statistics.median(values) for name, values in times.items()}
    return LinearRow(
        kind,
        first.out_features,
        first.in_features,
        _sparsity(first),
        batch,
        threads_on(x.device),
        median["torch"],
        median["dense"],
        median["packed"],
        dense_OI.nbytes,
        first.nbytes,
        buffer.nbytes / median["read"],
        sum(weight.nbytes for weight, _ in pairs) < CACHED_BYTES,
    )


def _product(x: Tensor, weight: Weight) -> Tensor:
    return (
        sparse_linear(x, weight) if isinstance(weight, PackedWeight) else channel_linear(x, weight)
    )


def _unpacked(weight: Weight) -> Tensor:
    return unpack(weight) if isinstance(weight, PackedWeight) else weight.dense()


def _sparsity(weight: Weight) -> float:
    if isinstance(weight, PackedWeight):
        return 1 - weight.packed.numel() / (weight.out_features * weight.in_features)
    dense_OI = weight.dense()
    return 1 - int(dense_OI.count_nonzero()) / dense_OI.numel()
