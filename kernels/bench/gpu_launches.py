"""Which kernels and torch operations a call launches, by name, in their order, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prune_llm_kernels import gpu_triton, gpu_triton_step

# views and memory without contents: no work of a device
IDLE = frozenset({
    "view", "slice", "select", "empty", "empty_strided", "new_empty", "unbind", "detach", "alias",
    "t", "as_strided", "_unsafe_view", "permute", "split", "split_with_sizes", "transpose",
    "unsqueeze", "expand",
})  # fmt: skip


class _Named(TorchDispatchMode):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in IDLE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """The names of what is launched inside. Our kernels are named and do not run."""
    names: list[str] = []

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **sizes: Any) -> None:
            devices = {part.device for part in arguments if isinstance(part, Tensor)}
            assert len(devices) == 1, f"{kernel.fn.__name__}: tensors on {devices}"
            names.append(kernel.fn.__name__)

        return launch

    kinds = {
        type(kernel)
        for module in (gpu_triton, gpu_triton_step)
        for kernel in vars(module).values()
        if hasattr(kernel, "arg_names") and hasattr(kernel, "__getitem__")
    }
    before = {kind: kind.__getitem__ for kind in kinds}
    for kind in kinds:
        kind.__getitem__ = launcher
    try:
        with _Named(names):
            yield names
    finally:
        for kind, method in before.items():
            kind.__getitem__ = method
