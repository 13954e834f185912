"""Decoding on a GPU without waiting for it: steps are launched before earlier tokens are read.

A step's graph takes the token that the last one drew, computes and draws the next one, and moves on
by a position; the host reads tokens some steps behind. What was launched behind a token that ends
the text is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from prune_llm.decoder import Decoder, PlanDecoder
from prune_llm.device_sampling import DeviceSampler, Needs
from prune_llm.pinned import HostCopy
from prune_llm.sampling import NO_NUMBER, NOTHING, Sampler, no_embedding
from prune_llm_kernels.gpu_graph import Recorded
from prune_llm_kernels.plan import DevicePlan

# enough to hide what the host does for a token
STEPS_AHEAD = 2


def runs_ahead(decoder: Decoder) -> bool:
    """Whether its steps wait for nothing: the reference's plan, on a GPU too, is no such one."""
    return isinstance(decoder, PlanDecoder) and isinstance(
        decoder.whole_step.blocks.plan, DevicePlan
    )


class RunningAhead:
    """One answer of a decoder whose prompt was prefilled.

    Args:
        most: tokens to draw; what the cache has room for behind the prompt.
    """

    def __init__(self, decoder: PlanDecoder, sampler: Sampler, most: int) -> None:
        plan = decoder.whole_step.blocks.plan
        assert isinstance(plan, DevicePlan)
        self._decoder, self._sampler, self._most, self._plan = decoder, sampler, most, plan
        vocabulary, device = decoder.parts.head.out_features, decoder.device
        self._drawing = DeviceSampler(1, 1, vocabulary, device)
        self._drawing.take(0, sampler)
        self._needs = Needs.of([sampler], vocabulary)
        self._step = Recorded(self._operations, device)
        self._arriving: deque[HostCopy] = deque()

    def tokens(self, logits_V: Tensor) -> Iterator[int]:
        """The tokens behind the prompt, whose logits are given; the caller stops when it wants.

        Raises:
            ValueError: the model computed no number at all, or its head gave a token that its
                embeddings do not have.
        """
        decoder, prompt = self._decoder, self._decoder.length
        decoder.position_B.fill_(prompt)
        launched = 0
        for place in range(self._most):
            while launched < min(self._most, place + 1 + STEPS_AHEAD):
                self._launch(launched, logits_V)
                launched += 1
            token = int(self._arriving.popleft().wait())
            if token == NOTHING:
                raise ValueError(NO_NUMBER)
            known = len(decoder.parts.embedding_VD)
            if token >= known:
                raise ValueError(no_embedding(token, known))
            self._sampler.note(token)
            decoder.length = prompt + place
            yield token

    @torch.inference_mode()
    def _launch(self, place: int, logits_V: Tensor) -> None:
        self._drawing.place([0])
        if place == 0:
            self._drawing.draw(logits_V[None], self._needs)
        else:
            self._step()
        self._arriving.append(HostCopy(self._drawing.tokens_B.clone()))

    def _operations(self) -> None:
        """A step, as its graph has it."""
        whole, embedding_VD = self._decoder.whole_step, self._decoder.parts.embedding_VD
        # a GPU would end with the process; `tokens` refuses what is outside the table
        token_B = self._drawing.tokens_B.clamp(0, len(embedding_VD) - 1)
        torch.index_select(embedding_VD, 0, token_B, out=whole.blocks.x_BD)
        self._plan.replay(1)
        self._drawing.draw(whole.head.logits_BV, self._needs)
        self._decoder.position_B += 1
