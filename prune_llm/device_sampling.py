"""Tokens drawn where the logits are: no step of a GPU waits for the host, or sends it the logits.

The rules are those of sampling.py, over rows of different sequences, and in shapes that do not
depend on values: a CUDA graph can hold them. A seed draws the tokens that it draws on the CPU, but
for rounding and for equal logits at the edge of top-k or top-p.

Shape letters: B = rows, S = slots of sequences, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_llm.pinned import host_to
from prune_llm.sampling import DRAWN, NOTHING, Sampler, place_of

_LEAST = torch.finfo(torch.float32).min


class Needs(NamedTuple):
    """What the rows of a run need, all together: there is a graph for each.

    Attributes:
        adjusts: biases or penalties. draws: not all are greedy. filters: some of those that are not
            have top-k, top-p or min-p.
    """

    adjusts: bool
    draws: bool
    filters: bool

    @staticmethod
    def of(samplers: Sequence[Sampler], vocabulary: int) -> Needs:
        drawing = [sampler for sampler in samplers if not sampler.greedy]
        return Needs(
            any(sampler.adjusts for sampler in samplers),
            bool(drawing),
            any(sampler.filters(vocabulary) for sampler in drawing),
        )


class _Settings(NamedTuple):
    """Of one sampler on the host, and of rows, float64 [B] each, on the device."""

    temperature: Any = 0.0  # 0: greedy
    filters: Any = 0.0  # 1: top-k, top-p or min-p
    top_k: Any = 0.0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition: Any = 1.0
    presence: Any = 0.0
    frequency: Any = 0.0

    @staticmethod
    def of(sampler: Sampler, vocabulary: int) -> _Settings:
        params = sampler.params
        return _Settings(
            0.0 if sampler.greedy else params.temperature,
            float(sampler.filters(vocabulary)),
            params.top_k or vocabulary,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )


class DeviceSampler:
    """The samplers of sequences, by slot.

    Attributes:
        tokens_B: int64, of the rows drawn last; NOTHING where no logit was a number.
        latest_S: of each slot, the one drawn last.
    """

    def __init__(self, slots: int, rows: int, vocabulary: int, device: torch.device) -> None:
        self._device, self._vocabulary, self._spare = device, vocabulary, slots
        self._samplers: dict[int, Sampler] = {}
        self.tokens_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.latest_S = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._slots_B = torch.full((rows,), slots, device=device)
        self._uniforms_B = torch.zeros(rows, dtype=torch.float64, device=device)
        # a slot more, greedy, for rows that belong to nobody
        nobody = torch.tensor([_Settings()] * (slots + 1), dtype=torch.float64)
        self._settings_S8 = nobody.to(device)
        self._adjustments: _Adjustments | None = None

    def take(self, slot: int, sampler: Sampler) -> None:
        """From here on the slot's rows are this sampler's, which has drawn what it has."""
        if self._samplers.get(slot) is sampler:
            return
        self._samplers[slot] = sampler
        settings = torch.tensor(_Settings.of(sampler, self._vocabulary), dtype=torch.float64)
        self._settings_S8[slot] = host_to(self._device, settings)
        if sampler.adjusts:
            if self._adjustments is None:
                self._adjustments = _Adjustments(self._spare + 1, self._vocabulary, self._device)
            self._adjustments.take(slot, sampler)
        elif self._adjustments is not None:
            self._adjustments.clear(slot)

    def leave(self, slot: int) -> None:
        self._samplers.pop(slot, None)

    def place(self, slots: Sequence[int | None]) -> Needs:
        """Whose the next rows are; None: nobody's. Takes a random number of each that needs one."""
        samplers = [None if slot is None else self._samplers[slot] for slot in slots]
        needs = Needs.of([s for s in samplers if s is not None], self._vocabulary)
        found = torch.tensor([self._spare if slot is None else slot for slot in slots])
        self._slots_B[: len(slots)] = host_to(self._device, found)
        if needs.draws:
            uniforms = [0.0 if s is None or s.greedy else s.uniform() for s in samplers]
            drawn = torch.tensor(uniforms, dtype=torch.float64)
            self._uniforms_B[: len(slots)] = host_to(self._device, drawn)
        return needs

    def filled(self, ids_B: Tensor, slots_B: Tensor, embeddings: int) -> Tensor:
        """Token ids, with what was drawn last of a row's slot for DRAWN.

        A GPU would end with the process at an id without embedding, so another takes its place:
        whoever reads the token refuses it, and what follows is thrown away.
        """
        latest_B = self.latest_S.index_select(0, slots_B).clamp(0, embeddings - 1)
        return torch.where(ids_B == DRAWN, latest_B, ids_B)

    def draw(self, logits_BV: Tensor, needs: Needs) -> None:
        """The next token of the rows that were placed; reads and writes the device only."""
        count = len(logits_BV)
        slots_B, missing_B = self._slots_B[:count], logits_BV.isnan().all(-1)
        settings = _Settings(*self._settings_S8[slots_B].unbind(1))
        adjustments = self._adjustments if needs.adjusts else None
        values_BV = logits_BV.float()
        if adjustments is not None:
            values_BV = adjustments.applied(values_BV, slots_B, settings)
        tokens_B = values_BV.nan_to_num(nan=-torch.inf).argmax(-1)
        if needs.draws:
            drawn_B = _drawn(values_BV, self._uniforms_B[:count], settings, needs.filters)
            tokens_B = torch.where(settings.temperature > 0, drawn_B, tokens_B)
        if adjustments is not None:
            adjustments.note(slots_B, tokens_B)
        tokens_B = torch.where(missing_B, NOTHING, tokens_B)
        self.tokens_B[:count] = tokens_B
        self.latest_S.index_copy_(0, slots_B, tokens_B)


def _drawn(values_BV: Tensor, uniforms_B: Tensor, settings: _Settings, filters: bool) -> Tensor:
    """Tokens [B] by the rows' random numbers; of greedy rows any."""
    divisor_B = torch.where(settings.temperature > 0, settings.temperature, 1.0).float()
    scaled_BV = (values_BV / divisor_B[:, None]).nan_to_num(nan=_LEAST)
    whole_B = place_of(uniforms_B, scaled_BV.softmax(-1))
    if not filters:
        return whole_B
    sorted_BV, ids_BV = scaled_BV.sort(stable=True, dim=-1, descending=True)
    place_B = place_of(uniforms_B, _kept(sorted_BV, settings))
    filtered_B = ids_BV.gather(-1, place_B[:, None])[:, 0]
    # a row draws the same whoever is beside it
    return torch.where(settings.filters > 0, filtered_B, whole_B)


def _kept(sorted_BV: Tensor, settings: _Settings) -> Tensor:
    """Probabilities; zeros where top-k, top-p or min-p leave a token out."""
    rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
    among_BV = rank_V < settings.top_k[:, None]
    probabilities_BV = sorted_BV.masked_fill(~among_BV, -torch.inf).softmax(-1)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    least_B1 = settings.min_p.float()[:, None] * probabilities_BV[:, :1]
    kept_BV = among_BV & (before_BV < settings.top_p.float()[:, None])
    kept_BV &= probabilities_BV >= least_B1
    kept_BV |= rank_V == 0  # a top-p near 0 is 0 in float32
    return probabilities_BV.masked_fill(~kept_BV, 0.0)


class _Adjustments:
    """What the logits of each slot are changed by."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device, shape = device, (slots, vocabulary)
        self._biases_SV = torch.zeros(shape, device=device)
        self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=device)
        self._seen_SV = torch.zeros(shape, dtype=torch.bool, device=device)

    def take(self, slot: int, sampler: Sampler) -> None:
        self.clear(slot)
        seen = sorted(sampler.prompt | sampler.drawn.keys())
        self._put(self._seen_SV, slot, seen, [True] * len(seen))
        biases, drawn = sampler.params.logit_bias, sampler.drawn
        self._put(self._biases_SV, slot, list(biases), list(biases.values()))
        self._put(self._counts_SV, slot, list(drawn), list(drawn.values()))

    def _put(self, table_SV: Tensor, slot: int, tokens: list[int], values: Sequence[float]) -> None:
        if tokens:
            place = host_to(self._device, torch.tensor(tokens))
            found = host_to(self._device, torch.tensor(values, dtype=table_SV.dtype))
            table_SV[slot].index_copy_(0, place, found)

    def clear(self, slot: int) -> None:
        for table_SV in (self._biases_SV, self._counts_SV, self._seen_SV):
            table_SV[slot].zero_()

    def applied(self, values_BV: Tensor, slots_B: Tensor, settings: _Settings) -> Tensor:
        """Bias, then penalties, rounded where Sampler rounds."""
        values_BV = values_BV + self._biases_SV[slots_B]
        exact_BV, penalty_B1 = values_BV.double(), settings.repetition[:, None]
        penalised_BV = torch.where(exact_BV > 0, exact_BV / penalty_B1, exact_BV * penalty_B1)
        counts_BV = self._counts_SV[slots_B]
        values_BV = torch.where(self._seen_SV[slots_B], penalised_BV.float(), values_BV)
        taken_BV = settings.presence[:, None] + settings.frequency[:, None] * counts_BV
        return torch.where(counts_BV > 0, values_BV - taken_BV.float(), values_BV)

    def note(self, slots_B: Tensor, tokens_B: Tensor) -> None:
        flat_B = slots_B * self._seen_SV.shape[1] + tokens_B
        ones_B = torch.ones_like(tokens_B, dtype=torch.int32)
        self._counts_SV.view(-1).scatter_add_(0, flat_B, ones_B)
        self._seen_SV.view(-1).index_fill_(0, flat_B, True)
