"""Selection by rank against a stable sort, with ties, infinities and both zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prune_llm_kernels.selection import mark_lowest, supports_mark_lowest


def by_sorting(scores_RW: Tensor, counts_R: Tensor) -> Tensor:
    """The definition: the first `count` places of a stable ascending sort."""
    ranks_RW = scores_RW.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks_RW < counts_R[:, None]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 1024), (17, 5000), (33, 64)], ids=str)
def test_equals_a_stable_sort(shape: tuple[int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    R, W = shape
    counts_R = torch.randint(W + 1, (R,))
    counts_R[0] = W // 2
    for scores_RW in (
        torch.randn(R, W),
        torch.rand(R, W).square(),
        torch.randint(4, (R, W)).float() - 1,
        torch.zeros(R, W) * torch.randn(R, W).sign(),  # +0.0 and -0.0 are equal
        torch.randn(R, W).exp() * 1e-42,  # below the normal numbers
    ):
        found_RW = mark_lowest(scores_RW, counts_R)
        assert found_RW.dtype == torch.bool
        assert torch.equal(found_RW, by_sorting(scores_RW, counts_R))


@given(
    st.lists(st.sampled_from([-torch.inf, -1.5, -0.0, 0.0, 1e-45, 2.0, torch.inf]), min_size=1),
    st.integers(0, 1000),
)
def test_any_scores(values: list[float], count: int) -> None:
    scores_RW = torch.tensor([values])
    counts_R = torch.tensor([count % (len(values) + 1)])
    assert torch.equal(mark_lowest(scores_RW, counts_R), by_sorting(scores_RW, counts_R))


def test_views_and_refusals() -> None:
    wide = torch.randn(6, 50)
    counts_R = torch.full((6,), 10)
    view = wide[:, ::2]
    assert torch.equal(mark_lowest(view, counts_R), by_sorting(view, counts_R))
    assert mark_lowest(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0, 5)
    with pytest.raises(ValueError, match="counts must lie between 0 and the 50"):
        mark_lowest(wide, torch.full((6,), 51))
    with pytest.raises(ValueError, match=r"counts is torch.int64 of shape \[5\]"):
        mark_lowest(wide, counts_R[:5])
    assert not supports_mark_lowest(wide.double())
