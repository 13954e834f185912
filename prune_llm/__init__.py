"""prune_llm: make large language models sparse, and serve them faster."""

from __future__ import annotations

from prune_llm.masks import Pattern as Pattern
from prune_llm.prune import Progress as Progress
from prune_llm.prune import PruneConfig as PruneConfig
from prune_llm.prune import prune as prune
from prune_llm.report import PruneReport as PruneReport

__version__ = "0.1.0"
