"""Token perplexity over windows (the pruning papers' protocol) and KL to the dense model.

Text is tokenised, put into consecutive windows of T tokens, and each window is scored alone: the
first token of a window is context only, so S windows predict S * (T - 1) tokens. This token_ppl
is not the word_ppl of lm-eval, and depends on T: only equal T compare.

Shape letters: S = windows, B = windows of a batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnWindow = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """What a model does to a text.

    Attributes:
        token_ppl: exp of the mean negative log likelihood per predicted token.
        nll: that mean, in nats; nll_stderr: its standard error over windows.
        tokens: how many were predicted, in windows of seq_len.
        kl: mean KL(dense || model) per predicted token in nats; None without a dense model.
        flips: share of predicted tokens whose most likely token differs from the dense model's.
    """

    token_ppl: float
    nll: float
    nll_stderr: float
    tokens: int
    windows: int
    seq_len: int
    kl: float | None = None
    flips: float | None = None


def token_perplexity(
    model: PreTrainedModel, windows_ST: Tensor, on_window: OnWindow | None = None
) -> Quality:
    """Score one model on windows of token ids int64 [S, T]."""
    return compare([model], windows_ST, against_first=False, on_window=on_window)[0]


@torch.inference_mode()
def compare(
    models: Sequence[PreTrainedModel],
    windows_ST: Tensor,
    *,
    against_first: bool,
    on_window: OnWindow | None = None,
    gates: Sequence[AbstractContextManager[object]] | None = None,
    context: int = 1,
) -> list[Quality]:
    """Score several models on windows of token ids int64 [S, T] in one pass.

    Args:
        against_first: the first model is the dense one; KL and flips of the others refer to it.
        gates: entered around each model's runs, one each; the models may then be one and the same.
        context: so many tokens at the start of a window are read and not scored.
    """
    gates = gates or [nullcontext()] * len(models)
    scores: list[list[_Score]] = [[] for _ in models]
    vocabulary = models[0].config.get_text_config(decoder=True).vocab_size
    batch_size = max(1, LOGITS // (windows_ST.shape[1] * vocabulary))
    for ids_BT in windows_ST.split(batch_size):
        dense_BTV: Tensor | None = None
        for model, gate, own in zip(models, gates, scores, strict=True):
            with gate:
                logits_BTV = _logits(model, ids_BT, context)
            own += _scores(logits_BTV, dense_BTV, ids_BT[:, context:].to(logits_BTV.device))
            if against_first and dense_BTV is None:
                dense_BTV = logits_BTV
        if on_window is not None:
            on_window(len(scores[0]), len(windows_ST))
    return [_quality(own, windows_ST.shape[1]) for own in scores]


# logits held at once for each model, 4 bytes each
LOGITS = 1 << 23


def _logits(model: PreTrainedModel, ids_BT: Tensor, context: int) -> Tensor:
    """Predictions of tokens ``context`` to T - 1, float32 [B, T - context, V]."""
    logits: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return logits[:, context - 1 : -1].float()


@dataclass(frozen=True)
class _Score:
    """Sums over the tokens of one window."""

    nll: float
    kl: float | None
    flips: int | None
    tokens: int


def _scores(logits_BTV: Tensor, dense_BTV: Tensor | None, targets_BT: Tensor) -> list[_Score]:
    """One score for each window of the batch."""
    tokens = targets_BT.shape[1]
    logs_BTV = functional.log_softmax(logits_BTV, dim=-1)
    picked_BT = logs_BTV.gather(2, targets_BT[:, :, None])[:, :, 0]
    nlls = (-picked_BT.sum(dim=1, dtype=torch.float64)).tolist()
    if dense_BTV is None:
        return [_Score(nll, None, None, tokens) for nll in nlls]
    dense_logs_BTV = functional.log_softmax(dense_BTV, dim=-1)
    kl_BT = (dense_logs_BTV.exp() * (dense_logs_BTV - logs_BTV)).sum(dim=-1)
    kls = kl_BT.sum(dim=1, dtype=torch.float64).tolist()
    flips = (logits_BTV.argmax(-1) != dense_BTV.argmax(-1)).sum(dim=1).tolist()
    return [_Score(*sums, tokens) for sums in zip(nlls, kls, flips, strict=True)]


def _quality(scores: list[_Score], seq_len: int) -> Quality:
    tokens = sum(score.tokens for score in scores)
    nll = math.fsum(score.nll for score in scores) / tokens
    kls = [score.kl for score in scores if score.kl is not None]
    flips = [score.flips for score in scores if score.flips is not None]
    return Quality(
        token_ppl=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        nll_stderr=_stderr([score.nll / score.tokens for score in scores]),
        tokens=tokens,
        windows=len(scores),
        seq_len=seq_len,
        kl=math.fsum(kls) / tokens if kls else None,
        flips=sum(flips) / tokens if flips else None,
    )


def _stderr(means: Iterable[float]) -> float:
    """Standard error of the mean of per-window means; nan for a single window."""
    values = torch.tensor(list(means), dtype=torch.float64)
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
