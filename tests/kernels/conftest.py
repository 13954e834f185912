"""Random weights, and memory that is poisoned wherever a kernel might forget to write."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and new_empty are full of NaN: an output element that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are faster so; the tests about threads ask for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_weight() -> Callable[[int, int, float, torch.dtype], Tensor]:
    """(O, I, density, dtype) -> weight with about that share of nonzeros, seeded by its shape."""

    def make(O: int, I: int, density: float, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(O * 1000 + I)
        keep = torch.rand(O, I, generator=generator) < density
        return (torch.randn(O, I, generator=generator) * keep).to(dtype)

    return make
