"""ALPS, ADMM, DSnoT, random and the refinement: their fixed points, guarantees and odd cases."""

from __future__ import annotations

import pytest
import torch
from random_layers import collect, correlated_inputs
from torch import Tensor

from prune_llm.masks import Pattern, check_keep_mask, keep_mask, zero_pruned
from prune_llm.methods import METHODS, Problem, Solution
from prune_llm.methods import admm as admm_module
from prune_llm.methods.alps import Inverse
from prune_llm.methods.backsolve import backsolve
from prune_llm.methods.gram import ScaledGram, scaled_gram
from prune_llm.refinement import CANDIDATES, refined

PATTERNS = ["0.5", "0.7", "2:4", "4:8", "1:3"]
ITERATIVE = ("admm", "alps")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def problem_of(x_TI: Tensor, weight_OI: Tensor, pattern: str, damping: float = 0.01) -> Problem:
    return Problem((weight_OI,), (Pattern.parse(pattern),), collect(x_TI), damping, 128)


def error(x_TI: Tensor, dense_OI: Tensor, pruned_OI: Tensor) -> float:
    return float((x_TI.double() @ (dense_OI - pruned_OI).double().T).square().sum())


def exact_on_support(gram_II: Tensor, dense_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """Row by row in float64: G_SS b_S = (G b0)_S."""
    gram, dense = gram_II.double(), dense_OI.double()
    solved = torch.zeros_like(dense)
    for row, (weights, keep) in enumerate(zip(dense, keep_OI, strict=True)):
        right = (gram @ weights)[keep]
        solved[row, keep] = torch.linalg.solve(gram[keep][:, keep], right)
    return solved


def scaled(x_TI: Tensor, damping: float = 0.01) -> ScaledGram:
    return scaled_gram(collect(x_TI), damping)


class TestScaledGram:
    def test_is_the_damped_gram_matrix_scaled(self) -> None:
        x = correlated_inputs(20)
        gram = scaled(x, 0.05)
        hessian = x.double().T @ x.double()
        hessian += 0.05 * hessian.diagonal().mean() * torch.eye(20)
        scale = hessian.diagonal().sqrt()
        torch.testing.assert_close(gram.scale_I.double(), scale, rtol=1e-5, atol=0)
        expected = hessian / scale / scale[:, None]
        torch.testing.assert_close(gram.gram_II.double(), expected, rtol=0, atol=1e-5)

    def test_not_finite_is_refused(self) -> None:
        statistics = collect(correlated_inputs(4))
        statistics.gram_II[2, 2] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            scaled_gram(statistics, 0.01)


class TestBacksolve:
    @pytest.mark.parametrize("shape_OI", [(9, 24), (1, 24), (5, 1)])
    def test_reaches_the_direct_solve(self, shape_OI: tuple[int, int]) -> None:
        gram = scaled(correlated_inputs(shape_OI[1]))
        dense = torch.randn(shape_OI)
        keep = torch.rand(shape_OI) > 0.5
        keep[0] = False  # a row with nothing left
        found = backsolve(gram, dense, zero_pruned(dense, keep), keep, steps=200)
        expected = exact_on_support(gram.gram_II, dense, keep)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)
        assert not found[~keep].any()

    def test_ten_steps_come_near_and_never_make_a_row_worse(self) -> None:
        gram, dense = scaled(correlated_inputs(60)), torch.randn(30, 60)
        keep = keep_mask(dense.abs(), Pattern(0.5), "matrix")
        start = zero_pruned(dense, keep)
        before = gram.error_O(dense - start)
        after = gram.error_O(dense - backsolve(gram, dense, start, keep))
        best = gram.error_O(dense - exact_on_support(gram.gram_II, dense, keep).float())
        assert bool((after <= before * (1 + 1e-5)).all())
        assert float(after.sum()) < 1.1 * float(best.sum())


class TestAlps:
    def test_inverse_of_any_penalty(self) -> None:
        gram = scaled(correlated_inputs(30))
        inverse = Inverse.of(gram)
        for rho in (0.004, 0.1, 30.0):
            product = inverse(rho) @ (gram.gram_II + rho * torch.eye(30))
            torch.testing.assert_close(product, torch.eye(30), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_weights_are_nearly_the_best_on_its_support(self, pattern: str) -> None:
        x, weight = correlated_inputs(48), torch.randn(20, 48)
        solution = METHODS["alps"].solve(problem_of(x, weight, pattern))[0]
        gram = scaled(x)
        exact = exact_on_support(gram.gram_II, weight * gram.scale_I, solution.keep_OI)
        best = float(gram.error_O(weight * gram.scale_I - exact.float()).sum())
        found = float(gram.error_O((weight - solution.weight_OI) * gram.scale_I).sum())
        assert best * (1 - 1e-4) <= found < 1.05 * best

    def test_beats_the_support_of_magnitudes(self) -> None:
        x, weight = correlated_inputs(48), torch.randn(20, 48)
        solution = METHODS["alps"].solve(problem_of(x, weight, "0.6"))[0]
        gram = scaled(x)
        dense = weight * gram.scale_I
        keep = keep_mask(dense.abs(), Pattern(0.6), "matrix")
        naive = exact_on_support(gram.gram_II, dense, keep).float()
        found = gram.error_O((weight - solution.weight_OI) * gram.scale_I)
        assert float(found.sum()) < 0.8 * float(gram.error_O(dense - naive).sum())

    def test_where_nothing_can_be_gained_it_ends(self) -> None:
        """Uncorrelated inputs: the largest scaled weights are the best support, as they are.

        The multipliers may still exchange weights that are nearly equal.
        """
        x = torch.eye(16) * torch.rand(16).add(0.5)
        weight = torch.randn(6, 16)
        solution = METHODS["alps"].solve(problem_of(x, weight, "0.5", damping=0.0))[0]
        keep = solution.keep_OI
        torch.testing.assert_close(solution.weight_OI, zero_pruned(weight, keep))
        best = keep_mask((weight * x.diagonal()).abs(), Pattern(0.5), "matrix")
        found, least = (error(x, weight, zero_pruned(weight, mask)) for mask in (keep, best))
        assert least <= found < 1.05 * least


class TestAdmm:
    def test_converges_to_the_best_weights_on_its_support(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The fixed point of the iteration: the ridge solution on the mask."""
        monkeypatch.setattr(admm_module, "STEPS", 3000)
        x, weight = correlated_inputs(24), torch.randn(8, 24)
        solution = METHODS["admm"].solve(problem_of(x, weight, "0.5", damping=0.1))[0]
        gram = scaled_gram(collect(x), 0.0)
        ridge_II = gram.gram_II + 0.1 * torch.eye(24)
        exact = exact_on_support(ridge_II, weight * gram.scale_I, solution.keep_OI)
        torch.testing.assert_close(
            (solution.weight_OI * gram.scale_I).double(), exact, rtol=0, atol=2e-3
        )


class TestDSnoT:
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_keeps_quotas_and_brings_the_means_nearer(self, pattern: str) -> None:
        x = correlated_inputs(64) + torch.randn(64)
        weight, parsed = torch.randn(30, 64), Pattern.parse(pattern)
        problem = problem_of(x, weight, pattern)
        solution, wanda = (METHODS[name].solve(problem)[0] for name in ("dsnot", "wanda"))
        assert check_keep_mask(solution.keep_OI, parsed, "row") is None
        assert torch.equal(solution.weight_OI, zero_pruned(weight, solution.keep_OI))
        mean_I = x.double().mean(0)
        before_O, after_O = (
            ((weight - s.weight_OI).double() @ mean_I).abs() for s in (wanda, solution)
        )
        assert bool((after_O <= before_O + 1e-4).all())
        assert float(after_O.sum()) < 0.5 * float(before_O.sum())


def test_random_depends_on_the_seed_alone() -> None:
    weight = torch.randn(8, 32)
    patterns = (Pattern(0.5), Pattern.parse("2:4"))

    def masks(seed: int) -> list[Tensor]:
        problem = Problem((weight, weight), patterns, None, 0.01, 128, seed)
        return [solution.keep_OI for solution in METHODS["random"].solve(problem)]

    assert all(torch.equal(a, b) for a, b in zip(masks(3), masks(3), strict=True))
    assert not torch.equal(masks(3)[0], masks(4)[0])


class TestOddCases:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("shape_OI", [(1, 1), (1, 40), (40, 1), (3, 5)])
    @pytest.mark.parametrize("pattern", ["0.5", "2:4"])
    def test_tiny_layers(self, name: str, shape_OI: tuple[int, int], pattern: str) -> None:
        x = correlated_inputs(shape_OI[1])
        problem = problem_of(x, torch.randn(shape_OI), pattern)
        solution = METHODS[name].solve(problem)[0]
        scope = METHODS[name].scope or "matrix"
        assert check_keep_mask(solution.keep_OI, Pattern.parse(pattern), scope) is None
        assert torch.isfinite(solution.weight_OI).all()

    @pytest.mark.parametrize("name", [*ITERATIVE, "dsnot", "ria"])
    @pytest.mark.parametrize("damping", [0.0, 0.01])
    def test_fewer_tokens_than_inputs(self, name: str, damping: float) -> None:
        x, weight = torch.randn(7, 40), torch.randn(12, 40)
        solution = METHODS[name].solve(problem_of(x, weight, "0.5", damping))[0]
        assert check_keep_mask(solution.keep_OI, Pattern(0.5), "matrix") is None
        assert torch.isfinite(solution.weight_OI).all()
        if name in ITERATIVE and damping:  # 20 weights a row explain 7 tokens
            nothing = error(x, weight, torch.zeros_like(weight))
            assert error(x, weight, solution.weight_OI) < 0.1 * nothing

    @pytest.mark.parametrize("name", ITERATIVE)
    def test_kept_weights_of_dead_inputs_stay(self, name: str) -> None:
        x, weight = correlated_inputs(16), torch.randn(5, 16)
        x[:, :12] = 0  # more dead inputs than are pruned
        solution = METHODS[name].solve(problem_of(x, weight, "0.5"))[0]
        kept = solution.keep_OI[:, :12]
        assert kept.any() and solution.keep_OI[:, 12:].all()
        torch.testing.assert_close(solution.weight_OI[:, :12][kept], weight[:, :12][kept])

    @pytest.mark.parametrize("name", ["ria", "alps", "admm", "dsnot"])
    def test_rows_and_columns_of_zeros(self, name: str) -> None:
        weight = torch.randn(6, 16)
        weight[2], weight[:, 5] = 0, 0
        solution = METHODS[name].solve(problem_of(correlated_inputs(16), weight, "0.5"))[0]
        assert torch.isfinite(solution.weight_OI).all()
        assert int((~solution.keep_OI).sum()) == 48


def best_swap(gram_II: Tensor, lost: Tensor, kept: Tensor, solved: Tensor, m: int) -> float:
    """The largest gain of any swap in one row, by trying all of them in float64."""
    width, best = len(lost), 0.0
    gram = gram_II.double()
    for i in range(width):
        for j in range(width):
            if kept[i] and not kept[j] and i // m == j // m:
                changed = lost.double().clone()
                changed[i] += solved[i]
                changed[j] -= gram[j] @ changed  # the best value: its slope becomes zero
                best = max(
                    best, float(lost.double() @ gram @ lost.double() - changed @ gram @ changed)
                )
    return best


class TestRefinement:
    @pytest.mark.parametrize("refinement", ["swaps", "backsolve", "both"])
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_no_row_gets_worse_and_counts_hold(
        self, pattern: str, method: str, refinement: str
    ) -> None:
        x, weight = correlated_inputs(50), torch.randn(24, 50)
        problem = problem_of(x, weight, pattern)
        found = METHODS[method].solve(problem)
        better = refined(problem, found, refinement)[0]
        gram = scaled(x)
        before, after = (
            gram.error_O((weight - s.weight_OI) * gram.scale_I) for s in (found[0], better)
        )
        assert bool((after <= before * (1 + 1e-4)).all())
        scope = METHODS[method].scope or "matrix"
        assert check_keep_mask(better.keep_OI, Pattern.parse(pattern), scope) is None
        assert not better.weight_OI[~better.keep_OI].any()
        if refinement == "backsolve":
            assert torch.equal(better.keep_OI, found[0].keep_OI)
        if method == "magnitude":
            assert float(after.sum()) < 0.8 * float(before.sum())

    @pytest.mark.parametrize("pattern", ["0.5", "2:4", "3:8"])
    def test_ends_where_no_swap_gains(self, pattern: str) -> None:
        width, parsed = 20, Pattern.parse(pattern)
        assert width <= CANDIDATES  # so all are looked at
        x, weight = correlated_inputs(width), torch.randn(6, width)
        problem = problem_of(x, weight, pattern)
        better = refined(problem, METHODS["magnitude"].solve(problem), "swaps")[0]
        gram = scaled(x)
        solved = better.weight_OI * gram.scale_I
        lost = weight * gram.scale_I - solved
        for row in range(6):
            error = float(lost[row].double() @ gram.gram_II.double() @ lost[row].double())
            gain = best_swap(
                gram.gram_II, lost[row], better.keep_OI[row], solved[row], parsed.m or width
            )
            assert gain < 1e-4 * error

    def test_dead_inputs_are_swapped_out_and_never_in(self) -> None:
        x, weight = correlated_inputs(16), torch.randn(4, 16)
        x[:, :4] = 0
        keep = torch.ones(4, 16, dtype=torch.bool)
        keep[:, 8:] = False
        start = Solution(zero_pruned(weight, keep), keep)
        better = refined(problem_of(x, weight, "0.5"), [start], "both")[0]
        assert not better.keep_OI[:, :4].any()
        assert bool((better.keep_OI.sum(1) == 8).all())
