"""Keys and values of models that run through transformers.

On a GPU they lie in a static cache, which no step allocates or moves, where the model's class
promises that it works with one; elsewhere in one that grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CacheChoice:
    """What keys and values of one sequence lie in.

    Attributes:
        tokens: that a static cache has room for; None: the model's own cache, which grows.
        name: what to say of it, "" where nothing else was asked for.
    """

    tokens: int | None
    name: str = ""

    def new(self, model: PreTrainedModel) -> Any:
        """An empty cache; None: the model makes its own."""
        return None if self.tokens is None else _static(model, self.tokens)


def choose_cache(model: PreTrainedModel, tokens: int, most: int | None = None) -> CacheChoice:
    """Static on a GPU where that is possible, else dynamic.

    Args:
        tokens: of a sequence, at most.
        most: tokens for which there is memory; None: enough.
    """
    if not wants_static(model):
        return CacheChoice(None)
    reason = _no_static(model)
    if reason is None and most is not None and tokens > most:
        reason = f"a static one of {tokens} tokens for every sequence does not fit"
    if reason is None:
        return CacheChoice(tokens, "static cache")
    return CacheChoice(None, f"dynamic cache: {reason}")


def transformers_name(reason: str, choice: CacheChoice) -> str:
    """Of what runs a model: transformers, why not our plan, and in which cache."""
    return f"transformers{f', {choice.name}' if choice.name else ''} ({reason})"


def wants_static(model: PreTrainedModel) -> bool:
    """Whether a static cache is worth having: a GPU waits for every allocation and copy."""
    return bool(model.device.type == "cuda")


def _no_static(model: PreTrainedModel) -> str | None:
    """Why a model has no static cache; None: it has."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"{type(model).__name__} has no static one"
    try:
        _static(model, 1)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        return f"{type(model).__name__} has no static one ({type(error).__name__}: {error})"
    return None


def _static(model: PreTrainedModel, tokens: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)
