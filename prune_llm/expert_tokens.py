"""What is done about an expert that few calibration tokens reach.

An expert sees only the tokens that its router sends it. With fewer of them than it has inputs their
Gram matrix is rank-deficient, and what is solved on it fits those tokens and no others. Measured on
random inputs of 128 features, error on tokens not seen: with 32 tokens SparseGPT loses 0.9 times
(low-rank inputs) to 4.8 times (full rank) what Wanda loses, and wins in both from twice as many
tokens as inputs; Wanda, which needs norms alone, loses 6 to 8 % more with 16 tokens than with 2048.

The rule, for the inputs of experts only:
- at least as many tokens as inputs: the run's method;
- fewer: Wanda in place of a method on the Gram matrix; weights are neither re-solved for the dense
  model's output nor refined;
- none: magnitude.
The report names the method and the tokens of every linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_llm.experts import without_index
from prune_llm.methods import METHODS
from prune_llm.sites import Site
from prune_llm.statistics import InputStatistics, Needs

if TYPE_CHECKING:
    from prune_llm.report import LinearResult

# experts that a warning names
NAMED = 3


def is_expert(kind: str) -> bool:
    return without_index(kind) != kind


def sees_few(site: Site, statistics: InputStatistics | None) -> bool:
    """Whether it is an expert's input, with fewer tokens than features."""
    if statistics is None or not is_expert(site.linears[0].kind):
        return False
    return statistics.tokens < site.width


def method_for(asked: str, site: Site, statistics: InputStatistics | None) -> str:
    """The method of a site by the rule; ``asked`` is the run's."""
    if statistics is not None and statistics.tokens == 0:
        return "magnitude"
    if sees_few(site, statistics) and Needs.GRAM in METHODS[asked].needs:
        return "wanda"
    return asked


def expert_warnings(linears: list[LinearResult]) -> list[str]:
    """One for the experts that no token reached, one for those that too few did."""
    experts = [r for r in linears if r.tokens is not None and is_expert(r.kind)]
    none = [r for r in experts if r.tokens == 0]
    few = [r for r in experts if r.tokens and r.tokens < _inputs(r)]
    warnings = []
    if none:
        warnings.append(
            f"no calibration token reached {len(none)} of {len(experts)} linears of experts "
            f"({_names(none)}): pruned by magnitude; give more samples"
        )
    if few:
        how = sorted({r.method for r in few})
        warnings.append(
            f"{len(few)} of {len(experts)} linears of experts saw fewer tokens than they have "
            f"inputs ({_names(few)}): pruned by {' and '.join(how)}, not re-solved; give more "
            "samples"
        )
    return warnings


def _inputs(result: LinearResult) -> int:
    return result.shape[0] if result.transposed else result.shape[1]


def _names(results: list[LinearResult]) -> str:
    named = [f"{r.name}: {r.tokens}" for r in results[:NAMED]]
    return ", ".join([*named, "..."] if len(results) > NAMED else named)
