"""Speculative decoding: a sparser level of the model proposes tokens, the level asked for verifies.

Shape letters: B = rows, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm.decode_statistics import DecodeStatistics
from prune_llm.pinned import HostCopy
from prune_llm.sampling import no_embedding

if TYPE_CHECKING:
    from prune_llm.decoder import PlanDecoder

MOST_DRAFTED = 15


@dataclass(frozen=True)
class Draft:
    """Speculative decoding with the model's own sparser level (Leviathan et al. 2023).

    Attributes:
        level: that proposes; tokens: how many it proposes at a time.
    """

    level: str
    tokens: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MOST_DRAFTED:
            raise ValueError(f"draft_tokens {self.tokens}: must be between 1 and {MOST_DRAFTED}")


class SpeculativeDecoder:
    """A draft level proposes tokens, the level asked for verifies them all in one run.

    The logits are those of that level, bit for bit where it is "dense": a proposal is used only
    when the caller draws the very same token, so any way of sampling stays exact.
    """

    def __init__(self, decoder: PlanDecoder, draft: Draft) -> None:
        level = decoder.statistics().level
        self.name = f"{decoder.name}, drafting at {draft.level}"
        self._decoder, self._draft, self._level = decoder, draft, level
        device = decoder.parts.device
        self._positions_B = torch.full((draft.tokens + 1,), -1, device=device)
        self._verifier = decoder.record(self._positions_B, level)
        self._drafter = decoder.record(decoder.position_B, draft.level)
        self._tokens_B = torch.zeros_like(self._positions_B)  # the given one and what it drafted
        self._drafts: HostCopy | None = None
        self._count = self._used = self._drafted = self._accepted = 0

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self._drafts, self._used = None, 0
        return self._decoder.prefill(ids)

    def step(self, token: int) -> Tensor:
        """Drafting and verifying wait for the device nowhere; the next call reads what was drafted.

        Raises:
            ValueError: the token has no embedding.
        """
        if token in self._proposals()[self._used : self._used + 1]:
            self._used += 1
            self._accepted += 1
        else:
            self._propose(token)
            self._verify()
        self._decoder.length += 1
        return self._verifier.head.logits_BV[self._used]

    def statistics(self) -> DecodeStatistics:
        gates = self._drafter.blocks.gates
        active, read = (None, None) if gates is None else (gates.active, gates.read)
        counted = self._drafted, self._accepted
        return DecodeStatistics(self._level, active, read, *counted, self._decoder.ways)

    def _proposals(self) -> list[int]:
        """Of the last draft, up to a token that has no embedding."""
        if self._drafts is None:
            return []
        proposed: list[int] = self._drafts.wait().tolist()
        known = len(self._decoder.parts.embedding_VD)
        return proposed[: next((n for n, t in enumerate(proposed) if t >= known), None)]

    @torch.inference_mode()
    def _propose(self, token: int) -> None:
        """Greedy tokens behind the given one. What the draft caches is overwritten in verifying."""
        decoder, drafter = self._decoder, self._drafter
        known = len(decoder.parts.embedding_VD)
        if token >= known:
            raise ValueError(no_embedding(token, known))
        left = decoder.capacity - decoder.length - 1  # behind the given token
        self._count = max(0, min(self._draft.tokens, left))
        self._tokens_B[0] = token
        decoder.position_B.fill_(decoder.length)
        for place in range(self._count):
            self._embed(self._tokens_B[place : place + 1], drafter.blocks.x_BD)
            drafter.blocks.plan.run()
            torch.argmax(drafter.head.logits_BV[0], out=self._tokens_B[place + 1])
            decoder.position_B += 1
        self._drafts, self._used = HostCopy(self._tokens_B[1 : self._count + 1].clone()), 0
        self._drafted += self._count

    @torch.inference_mode()
    def _verify(self) -> None:
        rows, start, blocks = self._count + 1, self._decoder.length, self._verifier.blocks
        self._positions_B.fill_(-1)
        torch.arange(start, start + rows, out=self._positions_B[:rows])
        self._embed(self._tokens_B[:rows], blocks.x_BD[:rows])
        blocks.plan.run()

    def _embed(self, tokens_B: Tensor, x_BD: Tensor) -> None:
        """A token without embedding is never accepted, see `_proposals`: any other stands for it,
        a GPU would end with the process."""
        embedding_VD = self._decoder.parts.embedding_VD
        known_B = tokens_B.clamp(max=len(embedding_VD) - 1)
        torch.index_select(embedding_VD, 0, known_B, out=x_BD)
