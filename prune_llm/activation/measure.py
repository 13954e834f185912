"""What thresholds do to a loaded model: the scores of its sites, perplexity, KL, realised sparsity.

Windows are token ids int64 [S, T]; every window is a sequence of its own and predicts T - 1 tokens.
Shape letters: S = windows, B = windows of a batch, T = tokens, V = vocabulary, I = inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from prune_llm.activation.gates import FirstDense, Gates, site_scales, weighted_mean
from prune_llm.activation.quantiles import Quantiles, ScoreHistogram
from prune_llm.activation.sites import ModelSite, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tokens run at once, and logits held at once (4 bytes each)
BATCH_TOKENS, LOGITS = 4096, 1 << 23
# log probabilities of the dense level are kept between passes while there are at most so many
KEPT_LOGITS = 1 << 28

Tick = Callable[[], None]


@dataclass(frozen=True)
class Measured:
    """Of one set of thresholds on one text. kl: mean KL(dense || gated), nats per token."""

    nll: float
    kl: float
    sparsity: float
    site_sparsity: tuple[float, ...]
    tokens: int

    @property
    def ppl(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass
class GatedModel:
    """A loaded model, its sites and the scales of their scores.

    Attributes:
        first_dense: tokens at the start of a window that stay dense and are not calibrated on.
        tick: told after every batch that was run.
    """

    model: PreTrainedModel
    sites: tuple[ModelSite, ...]
    scales: tuple[Tensor | None, ...]
    first_dense: FirstDense = 1
    tick: Tick = lambda: None
    _kept: tuple[Tensor, list[Tensor]] | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        criterion: str,
        ignore: tuple[str, ...] = (),
        granularity: str = "site",
    ) -> GatedModel:
        """Find the sites of a model. Raises ValueError as `find_sites` and `site_scales` do."""
        sites = find_sites(model, ignore, granularity)
        return cls(model, tuple(sites), tuple(site_scales(sites, criterion)))

    @property
    def dense(self) -> list[float]:
        """Thresholds that skip nothing but zeros."""
        return [0.0] * len(self.sites)

    def mean(self, shares: Sequence[float]) -> float:
        return weighted_mean(shares, self.sites)

    @torch.inference_mode()
    def quantiles(self, windows_ST: Tensor) -> Quantiles:
        """Of the scores on the dense level, all tokens after the first dense ones.

        Raises:
            ValueError: an input is not finite, naming its site.
        """
        histograms = [ScoreHistogram() for _ in self.sites]

        def watch(index: int, x: Tensor, scores: Tensor, _gated: Tensor) -> None:
            start = gates.dense_tokens(x)
            counted = scores[:, start:] if x.ndim == 3 else scores
            histograms[index].update(counted, self.sites[index].name)

        gates = Gates(self.sites, self.scales, self.dense, self.first_dense, watch)
        with gates:
            for ids_BT in self._batches(windows_ST):
                self.model.base_model(input_ids=ids_BT.to(self.model.device), use_cache=False)
                self.tick()
        return Quantiles.of(histograms)

    @torch.inference_mode()
    def measure(self, windows_ST: Tensor, thresholds: Sequence[float]) -> Measured:
        """Perplexity, KL and realised sparsity over all windows, float64 sums."""
        gates = Gates(self.sites, self.scales, thresholds, self.first_dense)
        nll = kl = 0.0
        batches = self._batches(windows_ST)
        for ids_BT, dense_BTV in zip(batches, self._dense_logs(windows_ST), strict=True):
            with gates:
                logs_BTV = self._logs(ids_BT)
            targets_BT1 = ids_BT[:, 1:, None].to(logs_BTV.device)
            nll -= float(logs_BTV.gather(2, targets_BT1).sum(dtype=torch.float64))
            kl += float(_kl_BT(dense_BTV.to(logs_BTV.device), logs_BTV).sum(dtype=torch.float64))
            self.tick()
        tokens = windows_ST.shape[0] * (windows_ST.shape[1] - 1)
        return Measured(
            nll / tokens, kl / tokens, gates.sparsity, tuple(gates.site_sparsity), tokens
        )

    def _logs(self, ids_BT: Tensor) -> Tensor:
        """Log probabilities of tokens 1 to T - 1, float32 [B, T - 1, V]."""
        logits = self.model(input_ids=ids_BT.to(self.model.device), use_cache=False).logits
        return functional.log_softmax(logits[:, :-1].float(), dim=-1)

    def _dense_logs(self, windows_ST: Tensor) -> Iterator[Tensor]:
        """Of the dense level, batch by batch; kept for the next pass over the same windows."""
        if windows_ST.numel() * self._vocabulary > KEPT_LOGITS:
            yield from (self._logs(ids_BT) for ids_BT in self._batches(windows_ST))
            return
        if self._kept is None or self._kept[0] is not windows_ST:
            logs = [self._logs(ids_BT).cpu() for ids_BT in self._batches(windows_ST)]
            self._kept = windows_ST, logs
        yield from self._kept[1]

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    def _batches(self, windows_ST: Tensor) -> tuple[Tensor, ...]:
        seq_len = windows_ST.shape[1]
        fit = min(BATCH_TOKENS // seq_len, LOGITS // (seq_len * self._vocabulary))
        batches: tuple[Tensor, ...] = windows_ST.split(max(1, fit))
        return batches

    def batches(self, windows_ST: Tensor) -> int:
        """How many times one pass over the windows ticks."""
        return len(self._batches(windows_ST))


def _kl_BT(dense_BTV: Tensor, logs_BTV: Tensor) -> Tensor:
    """KL(dense || gated) of every token, in nats."""
    return (dense_BTV.exp() * (dense_BTV - logs_BTV)).sum(dim=-1)
