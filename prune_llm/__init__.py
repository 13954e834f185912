"""prune_llm: make large language models sparse, and serve them faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_llm.activation.sparsify import SparsifyConfig as SparsifyConfig
from prune_llm.activation.sparsify import sparsify as sparsify
from prune_llm.config import PruneConfig as PruneConfig
from prune_llm.convert import export as export
from prune_llm.convert import info as info
from prune_llm.job import Progress as Progress
from prune_llm.masks import Pattern as Pattern
from prune_llm.prune import prune as prune
from prune_llm.pruning_level import prune_within as prune_within
from prune_llm.registration import register_when_imported
from prune_llm.report import PruneReport as PruneReport
from prune_llm.sampling import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from prune_llm.generation import generate as generate
    from prune_llm.generation import stream as stream
    from prune_llm.integration import load as load

__version__ = "0.1.0"

# from here on AutoModelForCausalLM.from_pretrained() loads sparse directories
register_when_imported()


def __getattr__(name: str) -> object:
    if name == "load":  # imports transformers, which importing prune_llm must not
        from prune_llm.integration import load

        return load
    if name in ("generate", "stream"):
        from prune_llm import generation

        return getattr(generation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
