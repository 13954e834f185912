"""A bundled model to start on: small enough to ship, good enough to lose something when pruned."""

from __future__ import annotations

from pathlib import Path

from prune_llm.demo.stories import SPLITS as SPLITS
from prune_llm.demo.stories import stories as stories
from prune_llm.demo.stories import story as story
from prune_llm.demo.stories import text as text


def model_path() -> Path:
    """Return the directory of the bundled model, in Hugging Face form (bfloat16 safetensors)."""
    return Path(__file__).parent / "model"
