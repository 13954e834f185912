"""What solving a site takes beside its weights and statistics: a table of what each method was
measured to take, for SparseGPT what its code holds in each of its two phases.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Copies:
    """What a method takes: Gram matrices, float32 copies of its site, of its largest linear."""

    grams: float
    site: float
    linear: float


# measured on single sites; of SparseGPT counted in the code: the Gram matrix's factor, the columns,
# results and masks while it sweeps
UNSTRUCTURED = {
    "magnitude": Copies(0.3, 1.5, 0.5),
    "wanda": Copies(0.3, 1.3, 1.0),
    "sparsegpt": Copies(1.0, 2.6, 1.0),
    "ria": Copies(0.5, 3.0, 0.5),
    "dsnot": Copies(0.8, 1.8, 10.3),
    "admm": Copies(8.3, 5.7, 5.9),
    "alps": Copies(12.0, 2.3, 11.3),
    "random": Copies(0.5, 2.5, 0.5),
}
GROUPS = {
    "magnitude": Copies(0.3, 1.5, 2.5),
    "wanda": Copies(0.3, 1.5, 2.5),
    "sparsegpt": Copies(1.0, 2.6, 1.5),
    "ria": Copies(0.5, 1.5, 3.5),
    "dsnot": Copies(0.8, 3.8, 7.1),
    "admm": Copies(8.0, 3.3, 11.3),
    "alps": Copies(11.5, 4.0, 9.5),
    "random": Copies(0.3, 1.5, 2.5),
}
# before the sweep: what factorising holds beside the Gram matrix (the damped copy, its factor)
FACTORING = {"sparsegpt": Copies(2.3, 0, 0)}
NOTHING = Copies(0, 0, 0)
AIMED = Copies(6.0, 1.0, 9.0)
REFINED = {
    "none": Copies(0, 0, 0),
    "swaps": Copies(5.0, 5.0, 20.0),
    "backsolve": Copies(2.8, 4.0, 5.0),
    "both": Copies(5.0, 5.0, 20.0),
}

# that sites solved together may take; SparseGPT then holds Gram matrices, damped copies, their
# factors and inverses, and weights as they came, columns, results and errors
TOGETHER_BYTES = 2**31


def together_bytes(width: int, weights: int) -> int:
    """What one of several sites takes that are solved together.

    Args:
        width: input features. weights: of all its linears.
    """
    return 4 * (4 * width**2 + 5 * weights)
