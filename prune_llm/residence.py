"""Weights in memory: read from the checkpoint when they are needed, dropped behind their use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from prune_llm.architecture import Architecture
from prune_llm.checkpoint import Checkpoint
from prune_llm.experts import RoutedExperts
from prune_llm.memory import trim_heap
from prune_llm.prefetch import Prefetch
from prune_llm.scratch import Scratch, aligned

# of experts that were read or solved: glibc keeps most of what aligned tensors of their size leave
TRIM_BYTES = 16 << 20


class Residence:
    """What of a model holds weights: a block, what lies outside the blocks, or both.

    Args:
        scratch: where the experts of a block lie, mapped, so that those that are not in use need
            no memory; None: in memory.

    Attributes:
        reads_ahead: whether the next block is read beside the work on one, as for a GPU.
    """

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path | None = None,
    ) -> None:
        self.architecture, self.checkpoint = architecture, checkpoint
        self.device, self.dtype = device, dtype
        self.reads_ahead = device.type == "cuda"
        self._directory = scratch
        self._scratch: Scratch | None = None
        self._settled = 0  # bytes since the heap was trimmed
        self._mapped: frozenset[str] = frozenset()  # names of what lies in it
        self._ahead = Prefetch(lambda name: checkpoint.tensor(name).read(), self.reads_ahead)

    def load(self, index: int) -> None:
        """Read the block's parameters and persistent buffers from disk onto the device."""
        if not any(p.is_meta for p in self.architecture.blocks[index].parameters()):
            return  # block 0, which was run before the walk
        experts = expert_weights(self.architecture, index)
        if self._directory is not None and experts:
            values = (self.architecture.model.get_parameter(name).numel() for name in experts)
            once = sum(aligned(count * self.dtype.itemsize) for count in values)
            self._scratch = Scratch(self._directory, 2 * once)  # dense, and pruned
            self._mapped = experts
        self._fill(self._block_names(index), self._ahead.take(index))
        for name, parameter in self.architecture.blocks[index].named_parameters():
            assert not parameter.is_meta, f"block {index}: {name} was not loaded"

    def release(self, index: int) -> None:
        """Drop the block's weights and give the memory back to the system."""
        for module in self.architecture.blocks[index].modules():
            _empty_parameters(module)
        self._scratch = None
        trim_heap()

    def settled(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the model where it is to lie while its block is in memory."""
        if self._scratch is None or name not in self._mapped:
            return weight
        self._settled += weight.nbytes
        if self._settled > TRIM_BYTES:
            trim_heap()
            self._settled = 0
        return self._scratch.put(weight)

    def read_ahead(self, index: int) -> None:
        """Begin to read a block, if there is one, where that is done beside other work."""
        if self.reads_ahead and index < len(self.architecture.blocks):
            known, names = self.architecture.disk_names, self._block_names(index)
            self._ahead.start(index, dict.fromkeys(known[n] for n in names if n in known))

    def stop(self) -> None:
        """Nothing that is being read will be wanted."""
        self._ahead.stop()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """With the embeddings in memory, and the buffers on the device."""
        outside = self.architecture.outside_names()
        self._fill(outside)
        _move_buffers(self.architecture.model, self.device)
        yield
        for name in outside:
            _empty_parameters(self.architecture.model.get_submodule(name.rpartition(".")[0]))

    def hold_head(self) -> None:
        """Read what lies outside the blocks, the output head too; it stays."""
        prefix = self.architecture.blocks_name + "."
        names = [n for n in self.architecture.model.state_dict() if not n.startswith(prefix)]
        self._fill(names)

    def _block_names(self, index: int) -> list[str]:
        prefix = self.architecture.block_name(index) + "."
        return [n for n in self.architecture.model.state_dict() if n.startswith(prefix)]

    def _fill(self, names: list[str], ahead: dict[str, Tensor] | None = None) -> None:
        """Put tensors into the model.

        Args:
            ahead: those that were read already, by name on disk.
        """
        for name in names:
            disk_name = self.architecture.disk_names.get(name)
            if disk_name is None:
                continue  # a buffer that its module makes itself
            tensor = (ahead or {}).get(disk_name)
            if tensor is None:
                tensor = self.checkpoint.tensor(disk_name).read()
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            placed = tensor.to(self.device, dtype, non_blocking=True)
            _set_tensor(self.architecture.model, name, self.settled(name, placed))


def expert_weights(architecture: Architecture, index: int) -> frozenset[str]:
    """Names of the matrices of a block's routed experts."""
    block, prefix = architecture.blocks[index], architecture.block_name(index)
    return frozenset(
        f"{prefix}.{path}.{name}"
        for path, module in block.named_modules()
        if isinstance(module, RoutedExperts)
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and name.endswith(".weight")
    )


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _empty_parameters(module: nn.Module) -> None:
    for leaf, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[leaf] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
