"""The pruning methods: one file per algorithm, all listed here."""

from __future__ import annotations

from prune_llm.methods.admm import Admm
from prune_llm.methods.alps import Alps
from prune_llm.methods.dsnot import DSnoT
from prune_llm.methods.magnitude import Magnitude
from prune_llm.methods.problem import Method as Method
from prune_llm.methods.problem import Problem as Problem
from prune_llm.methods.problem import Solution as Solution
from prune_llm.methods.problem import SolvesTogether as SolvesTogether
from prune_llm.methods.random import Random
from prune_llm.methods.ria import Ria
from prune_llm.methods.sparsegpt import SparseGPT
from prune_llm.methods.wanda import Wanda

METHODS: dict[str, Method] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(),
    "ria": Ria(),
    "dsnot": DSnoT(),
    "admm": Admm(),
    "alps": Alps(),
    "random": Random(),
}
