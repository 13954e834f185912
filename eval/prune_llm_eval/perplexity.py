"""Token perplexity over windows (the pruning papers' protocol) and KL to the dense model.

Text is tokenised, put into consecutive windows of T tokens, and each window is scored alone: the
first token of a window is context only, so S windows predict S * (T - 1) tokens. This token_ppl
is not the word_ppl of lm-eval, and depends on T: only equal T compare.

Shape letters: S = windows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
) -> list[Quality]:
    """Score several models on windows of token ids int64 [S, T] in one pass.

    ``against_first``: the first model is the dense one; KL and flips of the others refer to it.
    """
    scores: list[list[_Score]] = [[] for _ in models]
    for number, ids_T in enumerate(windows_ST):
        dense_TV: Tensor | None = None
        for model, own in zip(models, scores, strict=True):
            logits_TV = _logits(model, ids_T)
            own.append(_score(logits_TV, dense_TV, ids_T[1:].to(logits_TV.device)))
            if against_first and dense_TV is None:
                dense_TV = logits_TV
        if on_window is not None:
            on_window(number + 1, len(windows_ST))
    return [_quality(own, windows_ST.shape[1]) for own in scores]


def _logits(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Predictions of tokens 1 to T - 1, float32 [T - 1, V]."""
    logits = model(input_ids=ids_T[None].to(model.device), use_cache=False).logits
    return logits[0, :-1].float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Score:
    """Sums over the tokens of one window."""

    nll: float
    kl: float | None
    flips: int | None
    tokens: int


def _score(logits_TV: Tensor, dense_TV: Tensor | None, targets_T: Tensor) -> _Score:
    log_probs_TV = functional.log_softmax(logits_TV, dim=-1)
    nll = -log_probs_TV.gather(1, targets_T[:, None]).sum(dtype=torch.float64)
    if dense_TV is None:
        return _Score(float(nll), None, None, len(targets_T))
    dense_log_probs_TV = functional.log_softmax(dense_TV, dim=-1)
    kl = (dense_log_probs_TV.exp() * (dense_log_probs_TV - log_probs_TV)).sum(dtype=torch.float64)
    flips = (logits_TV.argmax(-1) != dense_TV.argmax(-1)).sum()
    return _Score(float(nll), float(kl), int(flips), len(targets_T))


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
