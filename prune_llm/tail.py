"""The rest of the dense model behind a block: what it predicts, and how that depends on the block.

Blocks are read from the checkpoint when they are run and dropped again, forwards and then
backwards, so that beside the block in training there is never more than one other; unless all of
them together are small. The embeddings, the last norm and the head stay.

Shape letters: T = tokens of one sample, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from prune_llm.blocks import Walk
from prune_llm.streams import hidden_of

# tokens whose logits are held at once
HEAD_TOKENS = 256
# a tail that is not larger stays in memory, which takes a third off the time of a step
RESIDENT_BYTES = 64 << 20


class Tail:
    """What is behind block ``index``: dense blocks and the head, in the walk's dtype."""

    def __init__(self, walk: Walk, index: int) -> None:
        assert walk.final is not None, "the dense model was not run to its end"
        self._walk, self._final, self._calls = walk, walk.final, walk.final.calls[1]
        self._behind = range(index + 1, len(walk.architecture.blocks))
        values = sum(p.numel() for i in self._behind for p in self._block(i).parameters())
        self._resident = values * walk.dtype.itemsize <= RESIDENT_BYTES
        if self._resident:
            for place in self._behind:
                walk.residence.load(place)

    def close(self) -> None:
        """Drop what stayed in memory."""
        for place in self._behind if self._resident else ():
            self._walk.residence.release(place)

    def divergence(self, hidden_1TD: Tensor, sample: int) -> tuple[Tensor, Tensor | None]:
        """KL(dense || with these hidden states) in nats a token, and its slope [1, T, D].

        The slope is None where gradients are not enabled.
        """
        hidden_1TD = hidden_1TD.detach().to(self._walk.dtype)
        through = self._at_once if self._resident else self._streamed
        value, slope = through(hidden_1TD, sample, torch.is_grad_enabled())
        return value, None if slope is None else slope.float()

    def _at_once(
        self, hidden_1TD: Tensor, sample: int, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        output_1TD = hidden_1TD.requires_grad_(wanted)
        for index in self._behind:
            output_1TD = self._run(index, output_1TD)
        value, slope = self._divergence_of_head(output_1TD.detach(), sample, wanted)
        if slope is not None and self._behind:
            (slope,) = torch.autograd.grad(output_1TD, hidden_1TD, slope)
        return value, slope

    def _streamed(
        self, hidden_1TD: Tensor, sample: int, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        inputs = [hidden_1TD]
        with torch.no_grad():
            for index in self._behind:
                with self._loaded(index):
                    inputs.append(self._run(index, inputs[-1]))
        value, slope = self._divergence_of_head(inputs.pop(), sample, wanted)
        if slope is None:
            return value, None
        for index, x_1TD in zip(reversed(self._behind), reversed(inputs), strict=True):
            with self._loaded(index), torch.enable_grad():
                x_1TD.requires_grad_(True)
                (slope,) = torch.autograd.grad(self._run(index, x_1TD), x_1TD, slope)
        return value, slope

    def _run(self, index: int, hidden_1TD: Tensor) -> Tensor:
        call = self._calls[index]
        return hidden_of(call.run(self._block(index), hidden_1TD))

    def _block(self, index: int) -> Any:
        return self._walk.architecture.blocks[index]

    @contextmanager
    def _loaded(self, index: int) -> Iterator[None]:
        self._walk.residence.load(index)
        try:
            yield
        finally:
            self._walk.residence.release(index)

    def _divergence_of_head(
        self, hidden_1TD: Tensor, sample: int, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        final_1TD = self._final.sample(sample).to(hidden_1TD.device)
        total = hidden_1TD.new_zeros((), dtype=torch.float32)
        slopes = []
        for ours, dense in zip(
            hidden_1TD.split(HEAD_TOKENS, 1), final_1TD.split(HEAD_TOKENS, 1), strict=True
        ):
            with torch.no_grad():
                expected_TV = self._log_probabilities(dense)
            with torch.set_grad_enabled(wanted):
                ours = ours.detach().requires_grad_(wanted)
                lost = kl_div(
                    self._log_probabilities(ours), expected_TV, reduction="sum", log_target=True
                )
                if wanted:
                    slopes += torch.autograd.grad(lost, ours)
            total += lost.detach()
        tokens = hidden_1TD.shape[1]
        return total / tokens, torch.cat(slopes, 1) / tokens if wanted else None

    def _log_probabilities(self, hidden_1TD: Tensor) -> Tensor:
        logits = self._walk.predict(hidden_1TD)
        return logits[0].float().log_softmax(-1)
