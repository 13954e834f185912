"""Where a model differs most from the dense one: harm that a mean over a text hides.

Everything comes from what scoring kept of each token (`TokenScores`), so it costs no second pass.
A difference is KL(dense || model) in nats, a flip (another likeliest token), or the increase of the
negative log likelihood (nll) of the token that came, negative where the model does better.

Shape letters: S = windows, T = tokens, P = predicted tokens of a window, N = S * P, V = vocabulary,
G = groups of tokens, C = passages of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prune_llm.vocabulary import Vocabulary, characters
from prune_llm_eval.paired import mean_stderr
from prune_llm_eval.perplexity import TokenScores

# predicted tokens of a passage; passages lie side by side in a window, the last may be shorter
PASSAGE = 32
# tokens of the window that are shown in front of a passage
BEFORE = 16
# a token that came less often has too uncertain a mean to be called hurt
LEAST_OCCURRENCES = 10
HURT_TOKENS = 20
# a token whose nll moved by more than this got clearly worse or better: e times less or more likely
CLEAR_NATS = 1.0
# where the groups of frequency end, in percent of the text, the most frequent tokens first
FREQUENCY_ENDS = (50, 80, 95)


@dataclass(frozen=True)
class Harm:
    """Means over some predicted tokens: KL and increase of nll in nats, share of flips."""

    tokens: int
    kl: float
    flips: float
    nll_increase: float


@dataclass(frozen=True)
class Bucket(Harm):
    """The tokens whose position, or whose count, is ``low`` to ``high``."""

    low: int
    high: int


@dataclass(frozen=True)
class HurtToken(Harm):
    """All places where one token came."""

    token: int
    text: str


@dataclass(frozen=True)
class Choice:
    """The token that a model holds for the likeliest."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class PassageToken:
    """A token of a passage and what both models made of its place.

    Attributes:
        text: the characters that it completes: those of all tokens are the passage's text.
        probability, dense_probability: of this token.
    """

    token: int
    text: str
    kl: float
    flipped: bool
    probability: float
    dense_probability: float
    choice: Choice
    dense_choice: Choice


@dataclass(frozen=True)
class Passage(Harm):
    """Consecutive predicted tokens of one window.

    Attributes:
        window: counted from 0; start: place of the first token in it.
        before: text of the tokens in front of it.
    """

    window: int
    start: int
    before: str
    text: str
    pieces: tuple[PassageToken, ...]


@dataclass(frozen=True)
class Forgotten(Harm):
    """How a model differs from the dense one, and where.

    Attributes:
        nll_increase_stderr: of ``nll_increase``, paired by window; nan for a single window.
        lost: share of tokens that were the dense model's choice and are not this one's;
            gained: the other way round.
        kl_median: of a token. kl_of_worst_percent: share of all KL that lies in the worst 1 % of
            the tokens; None where the models do not differ.
        nll_of_worse: what tokens that became less likely add to ``nll_increase``;
            nll_of_better: what the others take from it, negative. They sum to it.
        clearly_worse, clearly_better: share of tokens whose nll grew, or fell, by over a nat.
        by_position: by the number of tokens that were read before, in powers of two.
        by_frequency: by how often the token came among those that were predicted; the groups end
            at `FREQUENCY_ENDS` percent of the text. Tokens that came equally often share a group.
        hurt: tokens that came ten times or more, by their mean increase of nll, the worst first.
        passages: those with the largest sum of KL, the worst first; none that does not differ.
    """

    nll_increase_stderr: float
    lost: float
    gained: float
    kl_median: float
    kl_of_worst_percent: float | None
    nll_of_worse: float
    nll_of_better: float
    clearly_worse: float
    clearly_better: float
    by_position: tuple[Bucket, ...]
    by_frequency: tuple[Bucket, ...]
    hurt: tuple[HurtToken, ...]
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Difference:
    """Of two models at each predicted token: float64 [S, P], nats, and bool."""

    kl_SP: Tensor
    flipped_SP: Tensor
    nll_increase_SP: Tensor

    @staticmethod
    def of(dense: TokenScores, model: TokenScores) -> Difference:
        assert model.kl_SP is not None and model.flipped_SP is not None
        increase_SP = model.nll_SP.double() - dense.nll_SP.double()
        return Difference(model.kl_SP.double(), model.flipped_SP, increase_SP)


def forgotten(
    dense: TokenScores,
    model: TokenScores,
    windows_ST: Tensor,
    vocabulary: Vocabulary,
    passages: int,
) -> Forgotten:
    """Compare what two models made of the same windows of token ids.

    Args:
        model: scored against the dense model, so with KL.
        passages: how many to show at most.
    """
    difference = Difference.of(dense, model)
    context = windows_ST.shape[1] - model.nll_SP.shape[1]
    targets_SP = windows_ST[:, context:]
    right_SP, dense_right_SP = model.choice_SP == targets_SP, dense.choice_SP == targets_SP
    increase_SP = difference.nll_increase_SP
    kl_median, kl_of_worst_percent = concentration(difference.kl_SP.flatten())
    places = worst_passages(difference.kl_SP, passages)
    return Forgotten(
        **vars(overall(difference)),
        nll_increase_stderr=mean_stderr(increase_SP.mean(dim=1).tolist()),
        lost=_share(dense_right_SP & ~right_SP),
        gained=_share(right_SP & ~dense_right_SP),
        kl_median=kl_median,
        kl_of_worst_percent=kl_of_worst_percent,
        nll_of_worse=float(increase_SP.clamp(min=0).mean()),
        nll_of_better=float(increase_SP.clamp(max=0).mean()),
        clearly_worse=_share(increase_SP > CLEAR_NATS),
        clearly_better=_share(increase_SP < -CLEAR_NATS),
        by_position=by_position(difference, context),
        by_frequency=by_frequency(difference, targets_SP),
        hurt=hurt_tokens(difference, targets_SP, vocabulary),
        passages=tuple(
            _passage(window, slice(start, start + PASSAGE), dense, model, windows_ST, vocabulary)
            for window, start in places
        ),
    )


def _share(chosen: Tensor) -> float:
    return int(chosen.sum()) / chosen.numel()


def overall(difference: Difference) -> Harm:
    """Of all tokens."""
    everything_SP = torch.zeros_like(difference.flipped_SP, dtype=torch.int64)
    return Harm(**_harm(group_means(difference, everything_SP)[0]))


def group_means(difference: Difference, group_SP: Tensor) -> Tensor:
    """Tokens and means of KL, flips and increase of nll in each group: float64 [G, 4].

    Args:
        group_SP: int64, the group of each token, 0 to G - 1. The means of an empty group are nan.
    """
    group_N = group_SP.flatten()
    tokens_G = torch.bincount(group_N).double()
    columns = (difference.kl_SP, difference.flipped_SP.double(), difference.nll_increase_SP)
    sums = [torch.bincount(group_N, weights=column.flatten()) for column in columns]
    return torch.stack([tokens_G, *(sum_G / tokens_G for sum_G in sums)], dim=1)


def _harm(means: Tensor) -> dict[str, Any]:
    """A row of `group_means` under the names of `Harm`."""
    tokens, kl, flips, nll_increase = means.tolist()
    return {"tokens": int(tokens), "kl": kl, "flips": flips, "nll_increase": nll_increase}


def concentration(kl_N: Tensor) -> tuple[float, float | None]:
    """The median, and the share of the sum that the worst 1 % hold, rounded up to whole tokens;
    None where nothing differs."""
    worst_first_N = kl_N.sort(descending=True).values
    count, total = len(kl_N), float(kl_N.sum())
    median = float(worst_first_N[[(count - 1) // 2, count // 2]].mean())
    worst = float(worst_first_N[: -(-count // 100)].sum())
    return median, None if total == 0 else worst / total


def by_position(difference: Difference, context: int) -> tuple[Bucket, ...]:
    """By the tokens read before, ``context`` for the first one predicted: 1, 2-3, 4-7, 8-15 ..."""
    windows, predicted = difference.kl_SP.shape
    read_P = torch.arange(context, context + predicted)
    group_P = torch.bucketize(read_P, 2 ** torch.arange(1, 62), right=True)
    return _buckets(difference, group_P.expand(windows, -1), read_P.expand(windows, -1))


def by_frequency(difference: Difference, targets_SP: Tensor) -> tuple[Bucket, ...]:
    """By how often the token that came was among those predicted, the most frequent first."""
    count_SP = torch.bincount(targets_SP.flatten())[targets_SP]
    # tokens of the text that came more often than one that came n times
    counts, tokens = count_SP.unique(return_counts=True)
    more_often = tokens.sum() - tokens.cumsum(0)
    ends = torch.tensor(FREQUENCY_ENDS) * tokens.sum()
    group = torch.bucketize(100 * more_often, ends, right=True)
    group_SP = group[torch.searchsorted(counts, count_SP)]
    return _buckets(difference, group_SP, count_SP)


def _buckets(difference: Difference, group_SP: Tensor, value_SP: Tensor) -> tuple[Bucket, ...]:
    """Of each group that has tokens, between the least and the largest value that they have."""
    found = []
    for group, means in enumerate(group_means(difference, group_SP)):
        value_N = value_SP[group_SP == group]
        if len(value_N):
            low, high = int(value_N.min()), int(value_N.max())
            found.append(Bucket(**_harm(means), low=low, high=high))
    return tuple(found)


def hurt_tokens(
    difference: Difference, targets_SP: Tensor, vocabulary: Vocabulary
) -> tuple[HurtToken, ...]:
    """At most `HURT_TOKENS` that became less likely, of those with enough occurrences."""
    means_V4 = group_means(difference, targets_SP)
    enough_V = (means_V4[:, 0] >= LEAST_OCCURRENCES) & (means_V4[:, 3] > 0)
    tokens = enough_V.nonzero()[:, 0]
    order = means_V4[tokens, 3].sort(descending=True, stable=True).indices[:HURT_TOKENS]
    return tuple(
        HurtToken(**_harm(means_V4[token]), token=token, text=vocabulary.name(token))
        for token in tokens[order].tolist()
    )


def worst_passages(kl_SP: Tensor, count: int) -> list[tuple[int, int]]:
    """Window and first predicted token of the passages with the largest sum of KL, worst first."""
    rest = -kl_SP.shape[1] % PASSAGE
    sums_SC = functional.pad(kl_SP, (0, rest)).unflatten(1, (-1, PASSAGE)).sum(dim=2)
    sums, order = sums_SC.flatten().sort(descending=True, stable=True)
    # nan counts as the worst
    chosen = order[: min(count, int((~(sums <= 0)).sum()))].tolist()
    return [(place // sums_SC.shape[1], place % sums_SC.shape[1] * PASSAGE) for place in chosen]


def _passage(
    window: int,
    span: slice,
    dense: TokenScores,
    model: TokenScores,
    windows_ST: Tensor,
    vocabulary: Vocabulary,
) -> Passage:
    """``span``: of the predicted tokens of the window."""
    ids_T = windows_ST[window]
    start = len(ids_T) - model.nll_SP.shape[1] + span.start
    before = ids_T[max(0, start - BEFORE) : start].tolist()
    ids = ids_T[start:][:PASSAGE].tolist()
    texts = characters(map(vocabulary.spell, before + ids))
    own, other = _cut(model, window, span), _cut(dense, window, span)
    pieces = _pieces(ids, texts[len(before) :], own, other, vocabulary)
    return Passage(
        **vars(overall(Difference.of(other, own))),
        window=window,
        start=start,
        before="".join(texts[: len(before)]),
        text="".join(texts[len(before) :]),
        pieces=pieces,
    )


def _cut(scores: TokenScores, window: int, span: slice) -> TokenScores:
    """Of some tokens of one window: [1, PASSAGE] or less."""
    cut: dict[str, Any] = {
        name: None if value is None else value[window : window + 1, span]
        for name, value in vars(scores).items()
    }
    return TokenScores(**cut)


def _pieces(
    ids: list[int],
    texts: list[str],
    model: TokenScores,
    dense: TokenScores,
    vocabulary: Vocabulary,
) -> tuple[PassageToken, ...]:
    assert model.kl_SP is not None and model.flipped_SP is not None
    columns = (
        ids,
        texts,
        model.kl_SP[0].tolist(),
        model.flipped_SP[0].tolist(),
        (-model.nll_SP[0]).exp().tolist(),
        (-dense.nll_SP[0]).exp().tolist(),
        _choices(model, vocabulary),
        _choices(dense, vocabulary),
    )
    return tuple(PassageToken(*row) for row in zip(*columns, strict=True))


def _choices(scores: TokenScores, vocabulary: Vocabulary) -> list[Choice]:
    """Of the one window in ``scores``."""
    found = zip(scores.choice_SP[0].tolist(), scores.confidence_SP[0].tolist(), strict=True)
    return [Choice(token, vocabulary.name(token), probability) for token, probability in found]
