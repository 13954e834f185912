"""Allocations: exact budgets, what each is true to, and odd cases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_layers import collect, correlated_inputs
from torch import Tensor

from prune_llm import Pattern, Progress, PruneConfig, prune
from prune_llm.allocation import (
    ALLOCATIONS,
    MOST,
    OWL_RANGE,
    Survey,
    SurveyedSite,
    cheapest,
    lamp_scores,
    lower_hull,
    outlier_share,
    rounded,
    shifted,
)
from prune_llm.masks import pruned_per_row
from prune_llm.methods import METHODS
from prune_llm.statistics import Needs

SPREAD = [name for name in ALLOCATIONS if name != "uniform"]
CHANGE = 1.0


def survey_of(
    weights: dict[str, Tensor], sparsity: float, inputs: list[Tensor] | None = None
) -> Survey:
    """One linear a block."""

    def blocks(needs: Needs) -> Iterator[list[SurveyedSite]]:
        for place, (name, weight) in enumerate(weights.items()):
            x = inputs[place] if inputs else correlated_inputs(weight.shape[1], place)
            change = (lambda dense: lambda w: float((w - dense).square().mean()))(weight)
            yield [SurveyedSite((name,), (weight,), collect(x, needs), (change,))]

    return Survey(
        sizes={name: weight.numel() for name, weight in weights.items()},
        sparsity=sparsity,
        method="sparsegpt",
        damping=0.01,
        column_block=128,
        weights=lambda: iter(weights.items()),
        blocks=blocks,
    )


def layers(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (40, 64), "b": (64, 20), "c": (7, 33), "d": (128, 64)}
    return {
        name: torch.randn(shape, generator=generator) * (place + 1) ** 1.5
        for place, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.77, 0.97])
@pytest.mark.parametrize("name", SPREAD)
def test_adds_up_to_the_budget(name: str, sparsity: float) -> None:
    survey = survey_of(layers(), sparsity)
    allocation = ALLOCATIONS[name]
    assert allocation is not None
    counts = allocation.counts(survey)
    assert list(counts) == list(survey.sizes)
    assert sum(counts.values()) == survey.budget == round(sum(survey.sizes.values()) * sparsity)
    for linear, count in counts.items():
        # a whole number may lie one above the limit
        assert 0 <= count <= survey.sizes[linear] * max(MOST, sparsity) + 1


@pytest.mark.parametrize("name", SPREAD)
def test_one_linear_and_equal_linears(name: str) -> None:
    allocation = ALLOCATIONS[name]
    assert allocation is not None
    weight, x = torch.randn(12, 30), correlated_inputs(30)
    assert allocation.counts(survey_of({"only": weight}, 0.5, [x])) == {"only": 180}
    same = {"a": weight, "b": weight.clone(), "c": weight.clone()}
    counts = list(allocation.counts(survey_of(same, 0.5, [x] * 3)).values())
    assert sum(counts) == 540
    if name != "error":  # whose ties go to the first
        assert max(counts) - min(counts) <= 1


def test_zeros_everywhere() -> None:
    weights = {"a": torch.zeros(4, 8), "b": torch.zeros(6, 8)}
    for name in SPREAD:
        allocation = ALLOCATIONS[name]
        assert allocation is not None
        inputs = [torch.zeros(9, 8)] * 2
        assert sum(allocation.counts(survey_of(weights, 0.5, inputs)).values()) == 40


class TestMagnitudes:
    def test_one_threshold_over_all(self) -> None:
        weights = layers()
        counts = ALLOCATIONS["global-magnitude"].counts(survey_of(weights, 0.4))  # type: ignore[union-attr]
        everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
        border = everything.sort().values[round(0.4 * everything.numel())]
        for name, weight in weights.items():
            exact = int((weight.abs() < border).sum())
            if exact < MOST * weight.numel():
                # bins are 6 % wide and their weights taken to lie evenly
                assert counts[name] == pytest.approx(exact, abs=3 + 0.01 * weight.numel())

    def test_the_floor_holds_and_the_others_take_over(self) -> None:
        weights = {"small": torch.randn(50, 40) * 1e-3, "large": torch.randn(50, 40)}
        counts = ALLOCATIONS["global-magnitude"].counts(survey_of(weights, 0.5))  # type: ignore[union-attr]
        assert counts == {"small": 1900, "large": 100}

    def test_lamp_scores(self) -> None:
        weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
        expected = torch.tensor([0.0, 1 / 14, 4 / 13, 1.0])
        torch.testing.assert_close(lamp_scores(weight).float(), expected)

    def test_lamp_does_not_see_the_scale_of_a_linear(self) -> None:
        weights = layers()
        scaled = {name: weight * 2.0**place for place, (name, weight) in enumerate(weights.items())}
        lamp = ALLOCATIONS["lamp"]
        assert lamp is not None
        assert lamp.counts(survey_of(weights, 0.5)) == lamp.counts(survey_of(scaled, 0.5))


class TestOwl:
    def test_formula(self) -> None:
        weights = {name: weight.pow(3) for name, weight in layers().items()}
        inputs = [correlated_inputs(w.shape[1], p) for p, w in enumerate(weights.values())]
        survey = survey_of(weights, 0.6, inputs)
        owl = ALLOCATIONS["owl"]
        assert owl is not None
        counts = owl.counts(survey)
        shares = []
        for weight, x in zip(weights.values(), inputs, strict=True):
            scores = weight.double().abs() * x.double().square().sum(0).sqrt()
            shares.append(float((scores > 5 * scores.mean()).double().mean()))
        assert survey.record["outlier_share"] == pytest.approx(shares, abs=2e-3)
        low, high = min(shares), max(shares)
        raised = [2 * OWL_RANGE * (share - low) / (high - low) for share in shares]
        sizes = list(survey.sizes.values())
        mean = sum(r * n for r, n in zip(raised, sizes, strict=True)) / sum(sizes)
        for count, size, r in zip(counts.values(), sizes, raised, strict=True):
            assert count / size == pytest.approx(0.6 - (r - mean), abs=2e-3)

    def test_an_expert_counts_by_token(self) -> None:
        weight, x = torch.randn(9, 12).pow(3), torch.randn(300, 12)
        one = SurveyedSite(("a",), (weight,), collect(x), (lambda _: CHANGE,))
        twice = SurveyedSite(("a",), (weight,), collect(torch.cat([x, x])), (lambda _: CHANGE,))
        other = SurveyedSite(("b",), (weight * 2,), collect(x), (lambda _: CHANGE,))
        assert outlier_share([one, other]) == outlier_share([twice, other])


class TestCheapest:
    def test_two_convex_curves_meet_at_equal_slopes(self) -> None:
        curves = {
            "steep": [(n, 4.0 * n * n) for n in range(11)],
            "flat": [(n, 1.0 * n * n) for n in range(11)],
        }
        assert cheapest(curves, 10) == {"steep": 2, "flat": 8}

    def test_hull_leaves_out_what_lies_above(self) -> None:
        assert lower_hull([(0, 0.0), (1, 5.0), (2, 1.0), (3, 9.0)]) == [
            (0, 0.0),
            (2, 1.0),
            (3, 9.0),
        ]

    @given(st.data())
    def test_no_exchange_of_one_weight_gains(self, data: st.DataObject) -> None:
        slopes = st.lists(st.integers(0, 20), min_size=1, max_size=6)
        curves = {}
        for name in ("a", "b", "c"):
            total, curve = 0.0, [(0, 0.0)]
            for place, slope in enumerate(sorted(data.draw(slopes)), 1):
                total += slope
                curve.append((place, total))
            curves[name] = curve
        budget = data.draw(st.integers(0, sum(len(curve) - 1 for curve in curves.values())))
        counts = cheapest(curves, budget)
        assert sum(counts.values()) == budget
        saved = [c[n][1] - c[n - 1][1] for k, c in curves.items() if (n := counts[k]) > 0]
        costs = [c[n + 1][1] - c[n][1] for k, c in curves.items() if (n := counts[k]) + 1 < len(c)]
        assert not saved or not costs or max(saved) <= min(costs)

    @pytest.mark.parametrize(("rows", "more"), [(3, -1), (4, 1)])
    def test_ends_that_were_rounded_are_evened_out(self, rows: int, more: int) -> None:
        """At the most that is pruned every linear is at its end: 3 x 3 weights round 8.55 up to 9,
        4 x 3 round 11.4 down to 11, and the budget is of all three."""
        weights = {name: torch.randn(rows, 3) for name in ("a", "b", "c")}
        survey = survey_of(weights, MOST)
        allocation = ALLOCATIONS["error"]
        assert allocation is not None
        counts = allocation.counts(survey)
        assert sum(counts.values()) == survey.budget
        ends = {name: round(size * MOST) for name, size in survey.sizes.items()}
        assert survey.budget - sum(ends.values()) == more
        assert sum(abs(counts[name] - ends[name]) for name in ends) == 1


class TestBudgets:
    @given(st.lists(st.tuples(st.integers(1, 500), st.floats(-0.5, 1.5)), min_size=1, max_size=8))
    def test_shifted_is_exact_and_inside(self, entries: list[tuple[int, float]]) -> None:
        weights = {str(i): torch.zeros(1, size) for i, (size, _) in enumerate(entries)}
        survey = survey_of(weights, 0.6)
        counts = shifted(survey, {str(i): wanted for i, (_, wanted) in enumerate(entries)})
        assert sum(counts.values()) == survey.budget
        assert all(0 <= counts[name] <= size for name, size in survey.sizes.items())

    def test_largest_remainders_get_what_is_missing(self) -> None:
        sizes = {"a": 10, "b": 10, "c": 10}
        assert rounded(sizes, {"a": 1.5, "b": 2.7, "c": 0.8}, 5) == {"a": 1, "b": 3, "c": 1}
        assert rounded(sizes, {"a": 10.0, "b": 9.0, "c": 9.0}, 30) == dict.fromkeys("abc", 10)


# -- whole runs ----------------------------------------------------------------------------


def config(corpus: Path, **changes: Any) -> PruneConfig:
    settings = {"calibration": str(corpus), "samples": 6, "seq_len": 32, "device": "cpu"}
    return PruneConfig(**{**settings, **changes})


@pytest.mark.parametrize("target", ["pruned", "dense"])
@pytest.mark.parametrize("name", SPREAD)
def test_run_meets_the_budget_exactly(
    name: str, target: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    from prune_llm import info

    settings = config(corpus, allocation=name, pattern="0.613", target=target)
    seen: list[Progress] = []
    report = prune(tiny_llama, settings, tmp_path / "out", seen.append)
    weights = sum(result.weights for result in report.linears)
    assert sum(result.kept for result in report.linears) == weights - round(0.613 * weights)
    assert len({result.requested for result in report.linears}) > 1
    saved = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert saved["allocation"]["name"] == name and saved["allocation"]["weights"] == weights
    assert saved["allocation"]["pruned"] == round(0.613 * weights)
    assert info(tmp_path / "out", verify=True).pattern == "0.613"
    assert [p.done for p in seen] == list(range(1, seen[0].total + 1))  # type: ignore[operator]


def test_survey_leaves_the_dense_model_as_it_was(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """Equal shares: a run behind a survey gives the bytes of one without."""
    from prune_llm.checkpoint import open_checkpoint

    names = tuple(f"*.{kind}=0.5" for kind in ("o_proj", "up_proj", "down_proj", "gate_proj"))
    names += ("*.k_proj=0.5", "*.v_proj=0.5", "*.[12].*.q_proj=0.5")
    for allocation in ("uniform", "error"):
        settings = config(corpus, allocation=allocation, overrides=names, format="dense")
        prune(tiny_llama, settings, tmp_path / allocation)
    hashes = {open_checkpoint(tmp_path / a).sha256() for a in ("uniform", "error")}
    assert len(hashes) == 1


class TestOverrides:
    def test_patterns_of_their_own(self, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
        from prune_llm import info, load

        overrides = ("mlp.*=0.3", "mlp.down_proj=2:4", "model.layers.1.self_attn.q_proj=0")
        settings = config(corpus, overrides=overrides)
        report = prune(tiny_llama, settings, tmp_path / "out")
        for result in report.linears:
            asked = "0.5"
            if result.kind.startswith("mlp"):
                asked = "2:4" if result.kind == "mlp.down_proj" else "0.3"
            elif result.name == "model.layers.1.self_attn.q_proj":
                asked = "0"
            shape = (result.shape[0], result.shape[1])
            pruned = sum(pruned_per_row(shape, Pattern.parse(asked)))
            assert result.pattern == asked and result.weights - result.kept == pruned
        assert info(tmp_path / "out", verify=True).verified
        with torch.no_grad():
            assert torch.isfinite(load(tmp_path / "out")(torch.arange(9)[None]).logits).all()

    def test_the_budget_is_of_the_rest(
        self, tiny_llama: Path, corpus: Path, tmp_path: Path
    ) -> None:
        settings = config(corpus, method="magnitude", allocation="lamp", overrides=("mlp.*=0.2",))
        report = prune(tiny_llama, settings, tmp_path / "out")
        rest = [r for r in report.linears if not r.kind.startswith("mlp")]
        weights = sum(r.weights for r in rest)
        assert sum(r.kept for r in rest) == weights - round(weights / 2)

    def test_one_that_matches_nothing(self, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"set 'mlp\.dwn': matches no linear that is pruned"):
            prune(tiny_llama, config(corpus, overrides=("mlp.dwn=0.3",)), tmp_path / "out")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"overrides": ("mlp",)}, "must be NAMES=PATTERN"),
            ({"overrides": ("=0.5",)}, "must be NAMES=PATTERN"),
            ({"overrides": ("mlp.*=1.5",)}, r"set 'mlp.\*=1.5': pattern '1.5'"),
            ({"allocation": "owl", "pattern": "2:4"}, "the same everywhere"),
            ({"allocation": "fair"}, "allocation 'fair': unknown; choose one of uniform, owl"),
        ],
    )
    def test_bad_options(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PruneConfig(**changes)

    def test_command_line(self, cli: Any, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
        options = ("--calibration", corpus, "--samples", 4, "--seq-len", 32, "--device", "cpu")
        ran = cli(
            "prune", tiny_llama, "-o", tmp_path / "out", "--allocation", "owl", "--refine", "both",
            "--set", "mlp.down_proj=0.4", "--set", "*.0.*=0.2", *options,
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
        assert "allocation owl: linears lose" in ran.output
        report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
        assert report["config"]["overrides"] == ["mlp.down_proj=0.4", "*.0.*=0.2"]


@pytest.mark.parametrize("method", METHODS)
def test_error_curves_of_every_method(
    method: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """The survey collects what the method needs beside the Gram matrix."""
    options = {"samples": 2, "seq_len": 16, "calibration": str(corpus), "device": "cpu"}
    config = PruneConfig(method=method, allocation="error", **options)  # type: ignore[arg-type]
    report = prune(tiny_llama, config, tmp_path / "out")
    assert sum(r.weights - r.kept for r in report.linears) == report.allocation["pruned"]
