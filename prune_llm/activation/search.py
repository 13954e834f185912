"""One scalar, the overall sparsity, moved until the model is where it was asked to be."""

from __future__ import annotations

from collections.abc import Callable

# overall sparsities are found to this
RESOLUTION = 0.001
# a level with less than this is not worth having
LEAST = 0.01
# more than this is never looked for
MOST = 0.9
# corrections of the planned sparsity towards the realised one
CORRECTIONS = 3


class TargetNotMet(ValueError):
    """No sparsity worth having keeps the target; the message says what can be met."""


def largest_sparsity(increase: Callable[[float], float], allowed: float) -> float:
    """The largest overall sparsity whose perplexity increase is at most ``allowed``, by bisection.

    Args:
        increase: of an overall sparsity, as a fraction; taken to grow with it.

    Raises:
        TargetNotMet: the least sparsity worth having costs more already.
    """
    least = increase(LEAST)
    if not least <= allowed:
        raise TargetNotMet(
            f"max_ppl_increase {allowed:.4g}: cannot be met, a sparsity of {LEAST:.0%} already "
            f"costs {least:.2%} on the search text; allow at least {1.05 * least:.2%}"
        )
    low, high = LEAST, MOST
    if increase(high) <= allowed:
        return high
    while high - low > RESOLUTION:
        middle = (low + high) / 2
        low, high = (middle, high) if increase(middle) <= allowed else (low, middle)
    return low


def matching_sparsity(realised: Callable[[float], float], wanted: float) -> float:
    """The planned overall sparsity that realises the wanted one.

    Gating changes what later sites read, so that quantiles of the dense level realise a little
    less than planned.

    Args:
        realised: of a planned overall sparsity; it grows about as much as the plan.
    """
    planned = wanted
    for _ in range(CORRECTIONS):
        missing = wanted - realised(planned)
        if abs(missing) <= RESOLUTION:
            break
        planned = min(max(planned + missing, 0.0), 1.0)
    return planned
