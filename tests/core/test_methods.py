"""Every method against a literal float64 transcription of its paper, on random layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from random_layers import collect, correlated_inputs
from torch import Tensor

from prune_llm.masks import Pattern, check_keep_mask, spread
from prune_llm.methods import METHODS, Problem, SolvesTogether
from prune_llm.methods.sparsegpt import inverse_factor, inverse_factors

SHAPES = [(64, 172), (33, 300), (10, 128), (7, 5), (1, 1)]
PATTERNS = ["0.5", "0.63", "2:4", "4:8", "1:3", "3:4"]


def lowest_f64(scores: Tensor, count: int) -> Tensor:
    """The literal rank rule: a stable sort of the flattened scores."""
    marked = torch.zeros(scores.numel(), dtype=torch.bool)
    marked[scores.flatten().argsort(stable=True)[:count]] = True
    return marked.reshape(scores.shape)


def group_mask_f64(scores: Tensor, pattern: Pattern) -> Tensor:
    assert pattern.n is not None and pattern.m is not None
    parts = []
    for group in scores.split(pattern.m, dim=1):
        size = group.shape[1]
        kept = pattern.n if size == pattern.m else -(-pattern.n * size // pattern.m)
        parts.append(torch.stack([~lowest_f64(row, size - kept) for row in group]))
    return torch.cat(parts, dim=1)


def magnitude_f64(w: Tensor, _x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    scores = w.abs()
    if pattern.m is not None:
        keep = group_mask_f64(scores, pattern)
    else:
        keep = ~lowest_f64(scores, round(w.numel() * pattern.sparsity))
    return torch.where(keep, w, 0.0), keep


def wanda_f64(w: Tensor, x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    scores = w.abs() * x.square().sum(0).sqrt()
    if pattern.m is not None:
        keep = group_mask_f64(scores, pattern)
    else:
        counts = spread(round(w.numel() * pattern.sparsity), len(w))
        keep = torch.stack([~lowest_f64(r, c) for r, c in zip(scores, counts, strict=True)])
    return torch.where(keep, w, 0.0), keep


def sparsegpt_f64(w: Tensor, x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Algorithm 1 as printed: H^-1 formed, errors applied at once, block by block."""
    w, width = w.clone(), w.shape[1]
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    diagonal = upper.diagonal()
    keep = torch.ones_like(w, dtype=torch.bool)
    total = round(w.numel() * pattern.sparsity)
    m = pattern.m or 1
    block = -(-128 // m) * m
    for start in range(0, width, block):
        end = min(start + block, width)
        if pattern.m is None:
            scores = w[:, start:end] ** 2 / diagonal[start:end] ** 2
            count = total * end // width - total * start // width
            keep[:, start:end] = ~lowest_f64(scores, count)
        for i in range(start, end):
            if pattern.m is not None and i % m == 0:
                stop = min(i + m, width)
                scores = w[:, i:stop] ** 2 / diagonal[i:stop] ** 2
                keep[:, i:stop] = group_mask_f64(scores, pattern)
            error = torch.where(keep[:, i], 0.0, w[:, i]) / diagonal[i]
            w[:, i:] -= error[:, None] * upper[i, i:]
            w[:, i] = torch.where(keep[:, i], w[:, i], 0.0)
    return w, keep


def ria_f64(w: Tensor, x: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    scores = w.abs() / w.abs().sum(0) + w.abs() / w.abs().sum(1, keepdim=True)
    scores = scores * x.square().sum(0).pow(0.25)
    if pattern.m is not None:
        keep = group_mask_f64(scores, pattern)
    else:
        keep = ~lowest_f64(scores, round(w.numel() * pattern.sparsity))
    return torch.where(keep, w, 0.0), keep


TRANSCRIPTIONS: dict[str, Callable[[Tensor, Tensor, Pattern], tuple[Tensor, Tensor]]] = {
    "magnitude": magnitude_f64,
    "wanda": wanda_f64,
    "sparsegpt": sparsegpt_f64,
    "ria": ria_f64,
}


@pytest.mark.parametrize("pattern_text", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"O{s[0]}-I{s[1]}")
@pytest.mark.parametrize("method", TRANSCRIPTIONS)
def test_method_equals_its_transcription(
    method: str, shape: tuple[int, int], pattern_text: str
) -> None:
    pattern = Pattern.parse(pattern_text)
    x_TI = correlated_inputs(shape[1])
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(shape, generator=generator)
    second = torch.randn(5, shape[1], generator=generator)  # a linear that shares the input
    problem = Problem((first, second), (pattern, pattern), collect(x_TI), 0.01, 128)
    solutions = METHODS[method].solve(problem)
    for weight, solution in zip((first, second), solutions, strict=True):
        expected, keep = TRANSCRIPTIONS[method](weight.double(), x_TI.double(), pattern)
        assert torch.equal(solution.keep_OI, keep)
        # float32 rounding of a chain of I updates; the masks above are exact
        torch.testing.assert_close(
            solution.weight_OI.double(), expected, rtol=0, atol=2e-4 * float(weight.abs().max())
        )
        pruned = solution.weight_OI[~solution.keep_OI]
        assert not pruned.any() and not torch.signbit(pruned).any()
        scope = METHODS[method].scope or "matrix"
        assert check_keep_mask(solution.keep_OI, pattern, scope) is None


def test_patterns_may_differ_within_a_site() -> None:
    x_TI = correlated_inputs(40)
    weights = tuple(torch.randn(6, 40, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    patterns = (Pattern.parse("2:4"), Pattern.parse("0.7"))
    for name, method in METHODS.items():
        solved = method.solve(Problem(weights, patterns, collect(x_TI), 0.01, 128))
        for weight, pattern, solution in zip(weights, patterns, solved, strict=True):
            scope = method.scope or "matrix"
            assert check_keep_mask(solution.keep_OI, pattern, scope) is None, name
            if name in TRANSCRIPTIONS:
                _, keep = TRANSCRIPTIONS[name](weight.double(), x_TI.double(), pattern)
                assert torch.equal(solution.keep_OI, keep), name


def test_inputs_are_not_changed() -> None:
    weight = torch.randn(8, 24)
    before = weight.clone()
    for method in METHODS.values():
        problem = Problem((weight,), (Pattern(0.5),), collect(correlated_inputs(24)), 0.01, 8)
        method.solve(problem)
        assert torch.equal(weight, before)


def test_sparsegpt_beats_wanda_beats_magnitude_on_the_layer() -> None:
    x_TI, weight = correlated_inputs(96), torch.randn(48, 96)
    statistics = collect(x_TI)
    errors = {}
    for name, method in METHODS.items():
        solved = method.solve(Problem((weight,), (Pattern(0.5),), statistics, 0.01, 128))[0]
        errors[name] = statistics.relative_error(weight, solved.weight_OI).value
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < errors["random"] < 1
    assert errors["alps"] < errors["admm"] < errors["sparsegpt"]


class TestInverseFactor:
    def test_is_the_upper_factor_of_the_damped_inverse(self) -> None:
        gram = correlated_inputs(50).T @ correlated_inputs(50)
        factor = inverse_factor(gram, 0.01)
        damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(50)
        product = factor.upper_II.double().T @ factor.upper_II.double()
        assert torch.equal(factor.upper_II, factor.upper_II.triu())
        torch.testing.assert_close(product @ damped, torch.eye(50).double(), rtol=0, atol=1e-3)
        assert factor.notes == ()

    def test_too_few_tokens_escalate_and_say_so(self) -> None:
        x = torch.randn(3, 40)
        factor = inverse_factor(x.T @ x, 0.0)
        assert factor.damping > 0
        assert "damping raised from 0 to" in factor.notes[0]
        assert torch.isfinite(factor.upper_II).all()
        # not the identity: off-diagonal terms are there
        assert factor.upper_II.triu(1).abs().max() > 0

    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_non_finite_is_refused(self, broken: float) -> None:
        gram = torch.eye(4)
        gram[1, 1] = broken
        with pytest.raises(ValueError, match="not finite"):
            inverse_factor(gram, 0.01)

    def test_indefinite_is_refused(self) -> None:
        gram = torch.eye(4)
        gram[0, 1] = gram[1, 0] = 1000.0
        with pytest.raises(ValueError, match="could not be factorised"):
            inverse_factor(gram, 0.01)


@pytest.mark.parametrize("patterns", [("0.5", "0.5"), ("2:4", "0.6"), ("4:8", "4:8")], ids=str)
def test_sites_of_one_shape_solved_together(patterns: tuple[str, str]) -> None:
    """As each alone, but for sums in another order; one has dead inputs, one too few tokens."""
    width, rows = 70, (24, 9)
    inputs = [correlated_inputs(width) for _ in range(4)]
    inputs[1][:, 5] = 0
    inputs[2] = inputs[2][:3]
    problems = [
        Problem(
            tuple(torch.randn(count, width) for count in rows),
            tuple(Pattern.parse(text) for text in patterns),
            collect(x_TI), 0.0 if place == 2 else 0.01, 32,
        )
        for place, x_TI in enumerate(inputs)
    ]  # fmt: skip
    method = METHODS["sparsegpt"]
    assert isinstance(method, SolvesTogether)
    for some in (problems[:2] + problems[3:], [problems[2]] * 2):
        for problem, found in zip(some, method.solve_together(some), strict=True):
            alone = method.solve(problem)
            for place, (ours, other) in enumerate(zip(found, alone, strict=True)):
                assert check_keep_mask(ours.keep_OI, problem.patterns[place], "matrix") is None
                assert (ours.keep_OI != other.keep_OI).float().mean() < 0.01
                assert not ours.weight_OI[~ours.keep_OI].any()
                assert ours.notes == other.notes
                error, expected = (
                    problem.input_statistics()
                    .relative_error(problem.weights_OI[place], one.weight_OI)
                    .value
                    for one in (ours, other)
                )
                assert error == pytest.approx(expected, rel=0.02, abs=1e-6)


def test_what_fails_together_is_refused_as_alone() -> None:
    grams = [torch.eye(4) for _ in range(3)]
    assert [torch.equal(f.upper_II, inverse_factor(grams[0], 0.01).upper_II)
            for f in inverse_factors(grams, 0.01)] == [True] * 3  # fmt: skip
    grams[1][0, 1] = grams[1][1, 0] = 1000.0
    with pytest.raises(ValueError, match="could not be factorised"):
        inverse_factors(grams, 0.01)
    grams[1] = torch.full((4, 4), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        inverse_factors(grams, 0.01)


def test_dead_inputs_go_first_within_the_count() -> None:
    x_TI = correlated_inputs(16)
    x_TI[:, 3] = 0
    weight = torch.ones(4, 16)
    weight[:, 3] = 100.0
    problem = Problem((weight,), (Pattern(0.5),), collect(x_TI), 0.01, 128)
    for name in ("wanda", "sparsegpt", "ria", "admm", "alps"):
        solution = METHODS[name].solve(problem)[0]
        assert not solution.keep_OI[:, 3].any(), name
        assert int((~solution.keep_OI).sum()) == 32, name


def test_all_inputs_dead_still_gives_the_count() -> None:
    problem = Problem((torch.randn(4, 8),), (Pattern(0.5),), collect(torch.zeros(9, 8)), 0.01, 128)
    for method in METHODS.values():
        solution = method.solve(problem)[0]
        assert int((~solution.keep_OI).sum()) == 16
        assert torch.isfinite(solution.weight_OI).all()
