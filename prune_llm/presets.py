"""Ready choices of how a model is pruned: how much time for how much quality."""

from __future__ import annotations

from prune_llm.masks import Pattern

# fields of PruneConfig; what they cost and reach: README, "Choose a quality"
PRESETS: dict[str, dict[str, str]] = {
    "fast": {"method": "wanda"},
    "balanced": {"method": "wanda", "target": "dense", "refine": "backsolve"},
    "best": {
        "method": "wanda",
        "target": "dense",
        "refine": "backsolve",
        "allocation": "error",
        "reconstruction": "logits",
    },
}
# who gives one of these alone wants that, as published, and no preset around it
PARTS = ("method", "target", "refine", "reconstruction")
CHOSEN = (*PARTS, "allocation")
DEFAULT = "balanced"


def preset(quality: str, pattern: Pattern) -> dict[str, str]:
    """Fields of a PruneConfig; an N:M pattern leaves nothing to allocate.

    Raises:
        ValueError: there is none of that name.
    """
    if quality not in PRESETS:
        raise ValueError(f"quality {quality!r}: unknown; choose one of {', '.join(PRESETS)}")
    fields = dict(PRESETS[quality])
    if pattern.m is not None:
        fields.pop("allocation", None)
    return fields
