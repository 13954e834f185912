"""Masks: exact counts on any shape, ties, tails, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_llm.masks import (
    Pattern,
    check_keep_mask,
    keep_mask,
    lowest,
    pruned_per_row,
    spread,
    zero_pruned,
)


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "1.2", "-0.1", "1", "nan", "", "2:4:8", "a"])
def test_bad_pattern_is_refused_with_its_value(text: str) -> None:
    with pytest.raises(ValueError, match="pattern '"):
        Pattern.parse(text)


def test_n_of_m_counts_the_kept() -> None:
    assert Pattern.parse("1:4").sparsity == 0.75
    keep = keep_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), Pattern.parse("1:4"))
    assert keep.tolist() == [[False, True, False, False]]
    assert str(Pattern.parse("1:4")) == "1:4"
    assert str(Pattern.parse("0.50")) == "0.5"


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    sparsity=st.floats(0, 0.999),
    levels=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_unstructured_count_is_exact_under_any_ties(
    rows: int, width: int, sparsity: float, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (rows, width), generator=generator).float()
    pattern = Pattern(sparsity)
    for scope in ("row", "matrix"):
        keep = keep_mask(scores, pattern, scope)  # type: ignore[arg-type]
        assert int((~keep).sum()) == round(rows * width * sparsity)
        assert check_keep_mask(keep, pattern, scope) is None  # type: ignore[arg-type]
        if keep.any() and not keep.all() and scope == "matrix":
            assert scores[~keep].max() <= scores[keep].min()


@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 70),
    group=st.tuples(st.integers(1, 15), st.integers(2, 16)).filter(lambda g: g[0] < g[1]),
    seed=st.integers(0, 2**31),
)
def test_n_of_m_matches_brute_force(
    rows: int, width: int, group: tuple[int, int], seed: int
) -> None:
    n, m = group
    pattern = Pattern.parse(f"{n}:{m}")
    scores = torch.randint(3, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    keep = keep_mask(scores, pattern)
    for row in range(rows):
        for start in range(0, width, m):
            piece = scores[row, start : start + m].tolist()
            kept = n if len(piece) == m else -(-n * len(piece) // m)
            order = sorted(range(len(piece)), key=lambda i: (piece[i], i))
            expected = [i in order[len(piece) - kept :] for i in range(len(piece))]
            assert keep[row, start : start + m].tolist() == expected
    assert check_keep_mask(keep, pattern) is None
    assert int((~keep).sum()) == sum(pruned_per_row((rows, width), pattern))


def test_of_equal_scores_the_leftmost_goes_first() -> None:
    marked = lowest(torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]]), 3)
    assert marked.tolist() == [[True, True, False, False, True]]


def test_rows_differ_by_at_most_one() -> None:
    assert spread(10, 4) == [2, 3, 2, 3]
    pruned = pruned_per_row((64, 64), Pattern(0.6))
    assert sum(pruned) == round(64 * 64 * 0.6)
    assert set(pruned) == {38, 39}


def test_check_names_what_is_wrong() -> None:
    keep = torch.ones(2, 8, dtype=torch.bool)
    assert check_keep_mask(keep, Pattern(0.5)) == "0 weights pruned, 8 requested"
    keep[0] = False
    assert check_keep_mask(keep, Pattern(0.5)) == "the rows do not lose equally many weights"
    assert check_keep_mask(keep, Pattern(0.5), "matrix") is None
    assert "does not keep 2" in str(check_keep_mask(keep, Pattern.parse("2:4")))


def test_zero_pruned_keeps_every_bit_of_what_survives() -> None:
    weight = torch.tensor([[1.5, -2.5, -0.0, 3e-42], [-1e38, 7.0, -3.0, 2.0]])
    keep = torch.tensor([[True, False, True, True], [False, True, False, True]])
    found = zero_pruned(weight, keep)
    bits = weight.view(torch.int32)
    assert torch.equal(found.view(torch.int32), torch.where(keep, bits, torch.zeros_like(bits)))
    assert not torch.signbit(found[~keep]).any()
