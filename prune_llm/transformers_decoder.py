"""One sequence after another through transformers, for models that have no plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm.activation.decoding import ModelLevels
from prune_llm.activation.levels import DENSE
from prune_llm.attention import FastAttention
from prune_llm.decode_statistics import DecodeStatistics
from prune_llm.transformers_cache import choose_cache, transformers_name
from prune_llm_kernels.wide_products import WideProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersDecoder:
    """Any causal LM, by its own forward pass and a cache of transformers.

    Args:
        reason: why no plan decodes it. capacity: tokens of prompt and answer that must fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reason: str,
        capacity: int,
        levels: ModelLevels | None = None,
        level: str = DENSE,
    ) -> None:
        self._kept = choose_cache(model, capacity)
        self.name = transformers_name(reason, self._kept)
        self._model, self._level = model, level
        self._gates = None if levels is None or level == DENSE else levels.gates(model, level)
        self._cache: Any = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self._cache = self._kept.new(self._model)
        return self._run(list(ids))

    def step(self, token: int) -> Tensor:
        if self._gates is None:
            return self._run([token])
        with self._gates:
            return self._run([token])

    def statistics(self) -> DecodeStatistics:
        if self._gates is None or not any(self._gates.active):
            return DecodeStatistics(self._level)
        active = 1 - self._gates.sparsity
        return DecodeStatistics(self._level, active, active)

    @torch.inference_mode()
    def _run(self, ids: list[int]) -> Tensor:
        input_ids = torch.tensor([ids], device=self._model.device)
        with FastAttention(), WideProducts():
            output = self._model(
                input_ids=input_ids,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ValueError(
                f"{type(self._model).__name__}: keeps no key-value cache; call its own generate()"
            )
        logits_V: Tensor = output.logits[0, -1]
        return logits_V
