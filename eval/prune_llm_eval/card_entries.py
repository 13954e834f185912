"""Measured figures as `prune_llm.card_facts` keeps them beside a checkpoint, for its model card."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from prune_llm.card_facts import shown_text
from prune_llm.report import environment
from prune_llm_eval.comparison_report import finite
from prune_llm_eval.perplexity import Quality

FIGURES = ("token_ppl", "nll", "nll_stderr", "kl", "flips")
# a level, what the model does at it, and the share of inputs that it skipped
Scored = tuple[str, Quality, float | None]


def text_entry(text: str, dense: Quality | None, rows: Iterable[Scored]) -> dict[str, Any]:
    """Quality on a text: of the dense model, where it was scored, and at each level."""
    own = list(rows)
    first = own[0][1]
    return {
        "kind": "text",
        "on": shown_text(text),
        "seq_len": first.seq_len,
        "windows": first.windows,
        "tokens": first.tokens,
        "dense": None if dense is None else _figures(dense),
        "rows": [
            {"level": level, **_figures(quality), "skipped": skipped}
            for level, quality, skipped in own
        ],
    }


def where(device: torch.device, dtype: str) -> dict[str, str]:
    """On what and when, for any entry."""
    found = environment(device, torch.float32)
    names = {"device": found["device"], "prune-llm": found["prune-llm"]}
    stored = "in the stored dtype" if dtype == "auto" else dtype
    return {**names, "dtype": stored, "date": time.strftime("%Y-%m-%d")}


def _figures(quality: Quality) -> dict[str, Any]:
    saved = asdict(quality)
    found: dict[str, Any] = finite({name: saved[name] for name in FIGURES})
    return found
