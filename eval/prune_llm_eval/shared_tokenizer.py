"""Whether models that are compared share a tokenizer: else their figures are of different texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prune_llm.calibration import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# tokenizers that differ nowhere here and have one vocabulary are taken for the same
PROBE = "Once upon a time, in 1984, she said: “naïve café” -- x_1 = {a[0]};\n\t    İstanbul 漢字 🙂"


def check_tokenizers(models: Sequence[tuple[str, Path]], chat: bool) -> None:
    """By the name it was given and its directory."""
    found = [(name, load_tokenizer(directory)) for name, directory in models]
    for name, tokenizer in found:
        if chat and not tokenizer.chat_template:
            raise ValueError(f"apply_chat_template: the tokenizer of {name!r} has no chat template")
    for name, tokenizer in found[1:]:
        different = _difference(found[0][1], tokenizer, chat)
        if different is not None:
            raise ValueError(
                f"{found[0][0]!r} and {name!r} have different tokenizers ({different}); compare "
                "models that share a tokenizer"
            )


def _difference(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, chat: bool
) -> str | None:
    if first.get_vocab() != second.get_vocab():
        return f"vocabularies of {len(first)} and {len(second)} tokens, not the same ones"
    if first.encode(PROBE) != second.encode(PROBE):
        return "the same text becomes different tokens"
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(first, token) != getattr(second, token):
            return f"{token} {getattr(first, token)} and {getattr(second, token)}"
    if chat and first.chat_template != second.chat_template:
        return "their chat templates"
    return None
