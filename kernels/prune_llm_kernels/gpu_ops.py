"""The GPU's own ops, registered with torch: CUDA graphs and torch.compile see through them.

A list of channels is three tensors here; what they hold is in gpu.ChannelList. gpu.py, and triton
with it, is imported when an op first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm_kernels.channel_weight import ChannelWeight

if TYPE_CHECKING:
    from prune_llm_kernels.gpu import ChannelList

CHUNK = 128  # channels that share a list; a program reads some chunks
_LIBRARY = torch.library.Library("prune_llm", "FRAGMENT")
_LISTED = "Tensor listed, Tensor inputs, Tensor counts, int in_features"
_WEIGHT = "Tensor data, Tensor? starts, int out_features, int tile, Tensor? bias"


def list_channels(
    x_BI: Tensor, thresholds_B: Tensor, scales_I: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which channels count: |x| * scale > threshold in float32, found without the host.

    Returns:
        Channels int32 [C, CHUNK], their inputs [C, B, CHUNK], their numbers int32 [C].
    """
    return torch.ops.prune_llm.list_channels.default(x_BI, thresholds_B, scales_I)  # type: ignore[no-any-return]


def listed_linear(
    channels: tuple[Tensor, Tensor, Tensor], weight: ChannelWeight, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias over the listed channels, [B, O]; the others are not read."""
    return torch.ops.prune_llm.listed_linear.default(  # type: ignore[no-any-return]
        *channels, weight.in_features, *_parts(weight), bias
    )


def listed_swiglu(
    channels: tuple[Tensor, Tensor, Tensor],
    stacked: ChannelWeight,
    thresholds_B: Tensor,
    scales_O: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """silu(x W1^T) * (x W2^T), [B, O], of W1 above W2, and the list of its channels."""
    return torch.ops.prune_llm.listed_swiglu.default(  # type: ignore[no-any-return]
        *channels, stacked.in_features, *_parts(stacked), bias, thresholds_B, scales_O
    )


def _parts(weight: ChannelWeight) -> tuple[Tensor, Tensor | None, int, int]:
    return weight.data, weight.starts, weight.out_features, weight.tile


def _gpu() -> Any:
    return import_module("prune_llm_kernels.gpu")


def _tensors(channels: ChannelList) -> tuple[Tensor, Tensor, Tensor]:
    return channels.listed_CN, channels.x_CBN, channels.counts_C


def _list_channels(
    x: Tensor, thresholds: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, I = x.shape
    _check("thresholds", thresholds, torch.float32, B)
    if scales is not None:
        _check("scales", scales, torch.float32, I)
    return _tensors(_gpu().list_channels(x.contiguous(), thresholds, scales))


def _listed_linear(
    listed: Tensor, inputs: Tensor, counts: Tensor, in_features: int,
    data: Tensor, starts: Tensor | None, out_features: int, tile: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    weight = ChannelWeight(data, starts, out_features, in_features, tile)
    _check_list(inputs, weight, bias)
    channels = _gpu().ChannelList(listed, inputs, counts, in_features)
    y: Tensor = _gpu().listed_linear(channels, weight, bias)
    return y


def _listed_swiglu(
    listed: Tensor, inputs: Tensor, counts: Tensor, in_features: int,
    data: Tensor, starts: Tensor | None, out_features: int, tile: int, bias: Tensor | None,
    thresholds: Tensor, scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weight = ChannelWeight(data, starts, out_features, in_features, tile)
    _check_list(inputs, weight, bias)
    _check("thresholds", thresholds, torch.float32, inputs.shape[1])
    if scales is not None:
        _check("scales", scales, torch.float32, out_features // 2)
    gpu = _gpu()
    channels = gpu.ChannelList(listed, inputs, counts, in_features)
    y, following = gpu.listed_swiglu(channels, weight, bias, thresholds, scales)
    return y, *_tensors(following)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, length: int) -> None:
    if tensor.shape != (length,) or tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {list(tensor.shape)}; it must be {dtype}"
            f" [{length}], contiguous"
        )


def _check_list(inputs: Tensor, weight: ChannelWeight, bias: Tensor | None) -> None:
    chunks = -(-weight.in_features // CHUNK)
    if inputs.shape[0] != chunks or inputs.dtype is not weight.dtype:
        raise ValueError(
            f"the list is {inputs.dtype} of {inputs.shape[0]} chunks; the weight is {weight.dtype}"
            f" of {chunks}"
        )
    if bias is not None:
        _check("bias", bias, weight.dtype, weight.out_features)


def _fake_list(x: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    B, chunks = x.shape[0], -(-columns // CHUNK)
    return (
        x.new_empty((chunks, CHUNK), dtype=torch.int32),
        x.new_empty((chunks, B, CHUNK)),
        x.new_empty((chunks,), dtype=torch.int32),
    )


def _fake_list_channels(
    x: Tensor, thresholds: Tensor, scales: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_list(x, x.shape[1])


def _fake_listed_linear(
    listed: Tensor, inputs: Tensor, counts: Tensor, in_features: int,
    data: Tensor, starts: Tensor | None, out_features: int, tile: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return data.new_empty((inputs.shape[1], out_features))


def _fake_listed_swiglu(
    listed: Tensor, inputs: Tensor, counts: Tensor, in_features: int,
    data: Tensor, starts: Tensor | None, out_features: int, tile: int, bias: Tensor | None,
    thresholds: Tensor, scales: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = data.new_empty((inputs.shape[1], out_features // 2))
    return y, *_fake_list(y, out_features // 2)


# schema, implementation, shapes of the results
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "list_channels(Tensor x, Tensor thresholds, Tensor? scales) -> (Tensor, Tensor, Tensor)": (
        _list_channels,
        _fake_list_channels,
    ),
    f"listed_linear({_LISTED}, {_WEIGHT}) -> Tensor": (_listed_linear, _fake_listed_linear),
    f"listed_swiglu({_LISTED}, {_WEIGHT}, Tensor thresholds, Tensor? scales)"
    " -> (Tensor, Tensor, Tensor, Tensor)": (_listed_swiglu, _fake_listed_swiglu),
}

for _schema, (_implementation, _fake) in _OPS.items():
    _name = _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"prune_llm::{_name}", _fake, lib=_LIBRARY)
