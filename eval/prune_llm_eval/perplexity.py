"""Token perplexity over windows (the pruning papers' protocol) and KL to the dense model.

Text is tokenised, put into consecutive windows of T tokens, and each window is scored alone: the
first token of a window is context only, so S windows predict S * (T - 1) tokens. This token_ppl
is not the word_ppl of lm-eval, and depends on T: only equal T compare.

Shape letters: S = windows, B = windows of a batch, T = tokens, P = predicted tokens of a window,
V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from prune_llm_kernels.wide_products import WideProducts

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


@dataclass(frozen=True)
class TokenScores:
    """What a model made of every predicted token: tensors [S, P] on the CPU, 17 bytes a token.

    Attributes:
        nll_SP: negative log likelihood of the token that came, float32, nats.
        choice_SP: the likeliest token, int32; confidence_SP: its probability, float32.
        kl_SP: KL(dense || model), float32, nats; None without a dense model.
        flipped_SP: bool, the dense model's choice is another; None without a dense model.
    """

    nll_SP: Tensor
    choice_SP: Tensor
    confidence_SP: Tensor
    kl_SP: Tensor | None = None
    flipped_SP: Tensor | None = None


def compare(
    models: Sequence[PreTrainedModel],
    windows_ST: Tensor,
    *,
    against_first: bool,
    on_window: OnWindow | None = None,
    gates: Sequence[AbstractContextManager[object]] | None = None,
    context: int = 1,
) -> list[Quality]:
    """The quality of several models on one text; see `score_tokens`."""
    scores = score_tokens(
        models,
        windows_ST,
        against_first=against_first,
        on_window=on_window,
        gates=gates,
        context=context,
    )
    return [quality(own, windows_ST.shape[1]) for own in scores]


@torch.inference_mode()
def score_tokens(
    models: Sequence[PreTrainedModel],
    windows_ST: Tensor,
    *,
    against_first: bool,
    on_window: OnWindow | None = None,
    gates: Sequence[AbstractContextManager[object]] | None = None,
    context: int = 1,
) -> list[TokenScores]:
    """Score several models on windows of token ids int64 [S, T] in one pass.

    Args:
        against_first: the first model is the dense one; KL and flips of the others refer to it.
        gates: entered around each model's runs, one each; the models may then be one and the same.
        context: so many tokens of each window are read and not scored, so P = T - context.
    """
    gates = gates or [nullcontext()] * len(models)
    scores: list[list[TokenScores]] = [[] for _ in models]
    vocabulary = models[0].config.get_text_config(decoder=True).vocab_size
    batch_size = max(1, LOGITS // (windows_ST.shape[1] * vocabulary))
    done = 0
    for ids_BT in windows_ST.split(batch_size):
        dense_BPV: Tensor | None = None
        for model, gate, own in zip(models, gates, scores, strict=True):
            with gate:
                logits_BPV = _logits(model, ids_BT, context)
            own.append(_scores(logits_BPV, dense_BPV, ids_BT[:, context:].to(logits_BPV.device)))
            if against_first and dense_BPV is None:
                dense_BPV = logits_BPV
        done += len(ids_BT)
        if on_window is not None:
            on_window(done, len(windows_ST))
    return [_joined(own) for own in scores]


# logits held at once for each model, 4 bytes each
LOGITS = 1 << 23


def _logits(model: PreTrainedModel, ids_BT: Tensor, context: int) -> Tensor:
    """Predictions of tokens ``context`` to T - 1, float32 [B, T - context, V]."""
    with WideProducts():  # as a search for a target in quality measures
        logits: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
    return logits[:, context - 1 : -1].float()


def _scores(logits_BPV: Tensor, dense_BPV: Tensor | None, targets_BP: Tensor) -> TokenScores:
    """Of the windows of one batch."""
    logs_BPV = functional.log_softmax(logits_BPV, dim=-1)
    choice_BP = logits_BPV.argmax(-1)
    nll_BP = -_picked(logs_BPV, targets_BP)
    confidence_BP = _picked(logs_BPV, choice_BP).exp()
    own = TokenScores(nll_BP.cpu(), choice_BP.int().cpu(), confidence_BP.cpu())
    if dense_BPV is None:
        return own
    dense_logs_BPV = functional.log_softmax(dense_BPV, dim=-1)
    kl_BP = (dense_logs_BPV.exp() * (dense_logs_BPV - logs_BPV)).sum(dim=-1)
    flipped_BP = choice_BP != dense_BPV.argmax(-1)
    return replace(own, kl_SP=kl_BP.cpu(), flipped_SP=flipped_BP.cpu())


def _picked(logs_BPV: Tensor, ids_BP: Tensor) -> Tensor:
    return logs_BPV.gather(2, ids_BP[:, :, None])[:, :, 0]


def _joined(batches: Sequence[TokenScores]) -> TokenScores:
    names = [name for name, value in vars(batches[0]).items() if value is not None]
    return TokenScores(**{name: torch.cat([vars(own)[name] for own in batches]) for name in names})


def quality(scores: TokenScores, seq_len: int) -> Quality:
    """Means over all tokens, which were scored in windows of ``seq_len``."""
    windows, predicted = scores.nll_SP.shape
    nll_S = scores.nll_SP.sum(dim=1, dtype=torch.float64)
    tokens = windows * predicted
    nll = math.fsum(nll_S.tolist()) / tokens
    kl, flipped = scores.kl_SP, scores.flipped_SP
    return Quality(
        token_ppl=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        nll_stderr=_stderr(nll_S / predicted),
        tokens=tokens,
        windows=windows,
        seq_len=seq_len,
        kl=None if kl is None else float(kl.sum(dtype=torch.float64)) / tokens,
        flips=None if flipped is None else int(flipped.sum()) / tokens,
    )


def _stderr(means_S: Tensor) -> float:
    """Standard error of the mean of per-window means; nan for a single window."""
    return float(means_S.std() / len(means_S) ** 0.5) if len(means_S) > 1 else math.nan
