"""What the serving benchmark serves and asks: models made or given, prompts of mixed lengths."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_decode import SHAPE, make_model

from prune_llm import PruneConfig, prune
from prune_llm.demo import text as stories

# TinyLlama's, and llama2.c's stories110M with an output head of its own
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "1.1b": (SHAPE, 22),
    "110m": (
        {
            **SHAPE,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
        12,
    ),
}


def made_model(work: Path, size: str, pattern: str = "0.5") -> Path:
    """A Llama of random weights, pruned by magnitude; what is there is used again."""
    shape, blocks = SHAPES[size]
    packed = work / f"packed-{size}"
    if not packed.exists():
        dense = make_model(work / f"random-{size}", blocks, shape)
        prune(dense, PruneConfig(method="magnitude", pattern=pattern), packed)
    return packed


def dense_form(model: Path, work: Path) -> Path:
    """The same weights as any library loads them: the directory itself, or an export of it."""
    config = json.loads((model / "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") != "prune_llm":
        return model
    dense = work / f"dense-of-{model.resolve().name}"
    if not dense.exists():
        command = [sys.executable, "-m", "prune_llm", "export", str(model), "--format", "dense"]
        subprocess.run([*command, "--output", str(dense)], check=True, stdout=subprocess.DEVNULL)
    return dense


class Prompts:
    """Numbered texts of mixed lengths, the same for the same seed.

    From a text: pieces of it. Without one, and for models whose words mean nothing: random tokens.
    Lengths are spread evenly over their logarithms, so short ones are as frequent as long ones.
    """

    def __init__(
        self, model: Path, text: str | None, lengths: Sequence[int] = (16, 256), seed: int = 0
    ) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._lengths, self._seed = lengths, seed
        self._ids: list[int] = []
        if text is not None:
            self._ids = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._ids) <= lengths[1]:
                raise ValueError(
                    f"text: has {len(self._ids)} tokens; prompts of {lengths[1]} need more"
                )

    def __getitem__(self, number: int) -> str:
        chosen = random.Random(f"{self._seed}/{number}")
        shortest, longest = self._lengths
        length = round(shortest * (longest / shortest) ** chosen.random())
        if self._ids:
            start = chosen.randrange(len(self._ids) - length)
            ids = self._ids[start : start + length]
        else:
            special = len(self._tokenizer.all_special_ids)
            ids = [chosen.randrange(special, len(self._tokenizer)) for _ in range(length)]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def default_text() -> str:
    """Stories as the bundled model was trained on, which it has not seen."""
    return stories("held_out", 400)
