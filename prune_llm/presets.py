"""Ready choices of how a model is pruned: how much time for how much quality."""

from __future__ import annotations

# fields of PruneConfig; what they cost and reach: README, "Choose a quality"
PRESETS: dict[str, dict[str, str]] = {
    "fast": {"method": "wanda"},
    "balanced": {"method": "wanda", "target": "dense", "refine": "backsolve"},
    "best": {"method": "sparsegpt", "target": "dense", "reconstruction": "logits"},
}
CHOSEN = ("method", "target", "refine", "reconstruction")
DEFAULT = "balanced"


def preset(quality: str) -> dict[str, str]:
    """Fields of a PruneConfig.

    Raises:
        ValueError: there is none of that name.
    """
    if quality not in PRESETS:
        raise ValueError(f"quality {quality!r}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[quality]
