"""Essential sparsity on made-up curves."""

from __future__ import annotations

import math

import pytest

from prune_llm_eval.knee import Knee, find_knee

DENSE = 1.0
LIMIT = DENSE + math.log1p(0.05)


def test_between_two_points_the_logarithm_is_a_line() -> None:
    curve = [(0.5, DENSE + 4 * (LIMIT - DENSE)), (0.3, DENSE)]  # in any order
    knee = find_knee(curve, DENSE, 0.05)
    assert knee is not None and knee.relation == "at"
    assert knee.sparsity == pytest.approx(0.3 + 0.2 / 4, abs=1e-12)
    assert knee.text == "35.0%"


def test_a_point_on_the_limit_is_within() -> None:
    knee = find_knee([(0.2, 1.0), (0.4, LIMIT), (0.6, 3.0)], DENSE, 0.05)
    assert knee == Knee("at", 0.4)


def test_beyond_what_was_measured_nothing_is_guessed() -> None:
    assert find_knee([(0.3, 1.01), (0.7, 1.02)], DENSE, 0.05) == Knee("above", 0.7)
    assert find_knee([(0.3, 1.5), (0.7, 1.6)], DENSE, 0.05) == Knee("below", 0.3)
    assert find_knee([(0.5, 1.5)], DENSE, 0.05) == Knee("below", 0.5)
    assert find_knee([(0.5, 1.0)], DENSE, 0.05) == Knee("above", 0.5)
    assert find_knee([], DENSE, 0.05) is None
    assert (Knee("above", 0.7).text, Knee("below", 0.3).text) == ("above 70%", "below 30%")


def test_the_first_crossing_counts() -> None:
    curve = [(0.1, 1.0), (0.2, LIMIT + 0.1), (0.3, 1.0), (0.4, LIMIT + 1)]
    knee = find_knee(curve, DENSE, 0.05)
    assert knee is not None and 0.1 < knee.sparsity < 0.2
    # one that is below the dense model first and dips inside the limit
    dips = [(0.1, 0.9), (0.2, LIMIT - 0.01), (0.3, 0.95), (0.4, LIMIT + (LIMIT - 0.95))]
    knee = find_knee(dips, DENSE, 0.05)
    assert knee is not None and knee.sparsity == pytest.approx(0.35, abs=1e-12)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_broken_model_is_beyond_the_limit(broken: float) -> None:
    assert find_knee([(0.3, 1.0), (0.5, broken)], DENSE, 0.05) == Knee("at", 0.3)
    assert find_knee([(0.3, broken), (0.5, 1.0)], DENSE, 0.05) == Knee("below", 0.3)


def test_a_larger_increase_never_lowers_the_knee() -> None:
    curve = [(0.1 * k, 1.0 + 0.02 * k * k) for k in range(1, 8)]
    found = [find_knee(curve, DENSE, step / 100) for step in range(1, 250, 7)]
    places = [{"below": -1.0, "at": k.sparsity, "above": 2.0}[k.relation] for k in found if k]
    assert places == sorted(places) and places[0] == -1.0 and places[-1] == 2.0
