"""What a plan does while it runs, for checks and for bytes: its lists, and the weights it reads.

Only a run that is not replayed from a graph can be recorded: a plan's first.

Shape letters: B = rows, I = input features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_cases import read_bytes
from torch import Tensor

from prune_llm_kernels import ChannelWeight, gpu, gpu_linears


@contextmanager
def recorded_lists() -> Iterator[list[gpu.ChannelList]]:
    """The lists of channels in the order in which they are made."""
    lists: list[gpu.ChannelList] = []
    make, finish = gpu.list_channels, gpu.finish_swiglu

    def making(*arguments: Any) -> gpu.ChannelList:
        lists.append(make(*arguments))
        return lists[-1]

    def finishing(*arguments: Any) -> gpu.ChannelList | None:
        found = finish(*arguments)
        if found is not None:
            lists.append(found)
        return found

    with _instead(gpu, list_channels=making, finish_swiglu=finishing):
        yield lists


@contextmanager
def recorded_bytes() -> Iterator[list[int]]:
    """Bytes of the weights that each product reads: of the channels that its list has."""
    found: list[int] = []
    sparse, dense = gpu.product_sums, gpu_linears.dense_product

    def multiplying(
        x_BI: Tensor, channels: gpu.ChannelList | None, weight: ChannelWeight
    ) -> Tensor:
        active_I = torch.ones(weight.in_features, dtype=torch.bool)
        if channels is not None:
            active_I = kept_inputs(channels)[1]
        found.append(read_bytes(weight, active_I.to(weight.data.device)))
        return sparse(x_BI, channels, weight)

    def torch_multiplying(x_BI: Tensor, weight: ChannelWeight | Tensor) -> Tensor:
        O, I = (
            weight.shape
            if isinstance(weight, Tensor)
            else (weight.out_features, weight.in_features)
        )
        found.append(O * I * weight.dtype.itemsize)
        return dense(x_BI, weight)

    with (
        _instead(gpu, product_sums=multiplying),
        _instead(gpu_linears, dense_product=torch_multiplying),
    ):
        yield found


def kept_inputs(channels: gpu.ChannelList) -> tuple[Tensor, Tensor]:
    """The inputs of a list, zeros where they do not count, [B, I]; which channels it has, [I]."""
    rows, I = channels.x_CBN.shape[1], channels.in_features
    x_BI, active_I = channels.x_CBN.new_zeros(rows, I), torch.zeros(I, dtype=torch.bool)
    for chunk, count in enumerate(channels.counts_C.tolist()):
        which = channels.listed_CN[chunk, :count].long()
        x_BI[:, which] = channels.x_CBN[chunk, :, :count]
        active_I[which.cpu()] = True
    return x_BI, active_I


@contextmanager
def _instead(module: Any, **functions: Any) -> Iterator[None]:
    """Other functions under a module's names."""
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)
