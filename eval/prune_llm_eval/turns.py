"""Decoding speed of several checkpoints in one run: every one once a round, in turns.

Forwards in one round, backwards in the next, so that what the machine does meanwhile falls on all
alike. A checkpoint is loaded anew for its turn: only one is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from prune_llm.decoder import new_decoder
from prune_llm.generation import load_tokenizer
from prune_llm.memory import return_freed_memory
from prune_llm_eval.decode_speed import time_plan

# tokens decoded before the clock runs
WARM_UP = 8
Item = TypeVar("Item")


@dataclass(frozen=True)
class Decoding:
    """What is timed, one sequence at a time.

    Attributes:
        context: tokens of the prompt; tokens: decoded behind it.
        rounds: medians count. threads: None: as many as torch uses.
    """

    context: int = 16
    tokens: int = 64
    rounds: int = 5
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"tokens {self.tokens}: must be at least 2, the first is the prompt's")
        for name in ("context", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")


def in_turn(items: Sequence[Item], round_: int) -> list[Item]:
    """Forwards in even rounds, backwards in odd ones."""
    return list(items) if round_ % 2 == 0 else list(reversed(items))


def decode_speed(directory: Path, level: str, ids: list[int], tokens: int) -> tuple[float, str]:
    """Tokens per second behind the prompt ``ids``, and what decoded."""
    from prune_llm.integration import load

    return_freed_memory()
    model = load(directory).eval()
    tokenizer = load_tokenizer(model)
    decoder = new_decoder(model, len(ids) + tokens, level)
    time_plan(decoder, ids, min(WARM_UP, tokens), tokenizer)
    return time_plan(decoder, ids, tokens, tokenizer)[1], decoder.name


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
