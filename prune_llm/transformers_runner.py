"""Rows of many sequences through transformers, each sequence by itself.

Shape letters: T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm.activation.decoding import ModelLevels
from prune_llm.activation.gates import Gates
from prune_llm.activation.levels import DENSE
from prune_llm.attention import FastAttention
from prune_llm.segments import (
    SCORED_ROWS,
    BatchLimits,
    Ran,
    Segment,
    cache_size,
    model_context,
)
from prune_llm.transformers_cache import choose_cache, transformers_name
from prune_llm_kernels.wide_products import WideProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersRunner:
    """Any causal LM, sequence by sequence, by its own forward pass and its own caches.

    Prompts run in pieces of one fixed size and drawn tokens one by one, so that nothing depends on
    other sequences. Pages are counted, not used.
    """

    shares = draws = False
    warm_rows: tuple[int, ...] = ()
    ways: tuple[dict[str, Any], ...] = ()
    piece = SCORED_ROWS

    def __init__(
        self, model: PreTrainedModel, reason: str, levels: ModelLevels | None, limits: BatchLimits
    ) -> None:
        self.limits = limits
        self._model, self._caches = model, dict[int, Any]()
        self._gates: dict[str, Gates] = {}
        if levels is not None:
            names = [level.name for level in levels.table.levels]
            self._gates = {name: levels.gates(model, name) for name in names}
        self.levels = (DENSE, *self._gates)
        heads, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        sizes = [len(m.weight) for m in (heads, embedding) if m is not None]
        self.vocabulary = min(sizes)
        bytes_per_token = measured_token_bytes(model)
        self.pages, self.context = cache_size(limits, bytes_per_token, model_context(model))
        holds = self.pages * limits.page_size
        longest = min(self.context, holds)
        self._kept = choose_cache(model, longest, holds // limits.max_rows)
        self.name = transformers_name(reason, self._kept)

    def run(self, segments: Sequence[Segment]) -> Ran:
        ran = [self._run_segment(segment) for segment in segments]
        active = [active for _, active in ran]
        return Ran(torch.cat([logits for logits, _ in ran]), lambda: active)

    def leave(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def _run_segment(self, segment: Segment) -> tuple[Tensor, float | None]:
        if segment.level is None:
            logits_TV = self._forward(segment.slot, segment.tokens, max(1, segment.wanted))
            return logits_TV[len(logits_TV) - segment.wanted :], None
        gates, found, shares = self._gates.get(segment.level), [], []
        for token in segment.tokens:
            if gates is None:
                found.append(self._forward(segment.slot, [token], 1))
                continue
            gates.reset()
            with gates:
                found.append(self._forward(segment.slot, [token], 1))
            shares.append(1 - gates.sparsity)
        logits_TV = torch.cat(found)
        active = sum(shares) / len(shares) if shares else None
        return logits_TV[len(logits_TV) - segment.wanted :], active

    @torch.inference_mode()
    def _forward(self, slot: int, tokens: Sequence[int], keep: int) -> Tensor:
        """Logits [keep, V] behind the last tokens."""
        if slot not in self._caches:
            self._caches[slot] = self._kept.new(self._model)
        with FastAttention(), WideProducts():
            output = self._model(
                input_ids=torch.tensor([list(tokens)], device=self._model.device),
                past_key_values=self._caches[slot],
                use_cache=True,
                logits_to_keep=keep,
            )
        self._caches[slot] = output.past_key_values
        logits_TV: Tensor = output.logits[0]
        return logits_TV


@torch.inference_mode()
def measured_token_bytes(model: PreTrainedModel) -> int:
    """Of what one token leaves in the model's own cache."""
    output = model(input_ids=torch.tensor([[0]], device=model.device), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    tensors = [x for x in found if isinstance(x, Tensor)]
    if not tensors or len(tensors) < len(found):
        raise ValueError(
            f"{type(model).__name__}: keeps no key-value cache; call its own generate()"
        )
    return sum(x.nbytes for x in tensors)
