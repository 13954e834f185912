"""What came of a step: tokens and log-probabilities, on their way to the host.

Where the device draws, all that is needed of a run is copied behind it and can be read when later
runs were launched; else tokens are drawn here from its logits, before the next run.

Shape letters: W = rows whose logits are wanted, T = rows of one sequence, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prune_llm.pinned import HostCopy, host_to
from prune_llm.sampling import NO_NUMBER, NOTHING
from prune_llm.segments import Ran, Segment
from prune_llm.sequences import LiveSequence, ScoredToken


class Drawn(NamedTuple):
    """What a sequence got whose tokens are all computed.

    Attributes:
        token: None: only its prompt was asked for, or ``error`` says why there is none.
        score: of the token, if asked.
    """

    sequence: LiveSequence
    token: int | None = None
    score: ScoredToken | None = None
    error: str | None = None


class _Part(NamedTuple):
    """A segment's share of a run.

    Attributes:
        last: whether its last row is that of the last token. row: of that one, among all wanted.
        looked_at: its rows among those whose logits the host sees: all wanted, or none.
    """

    sequence: LiveSequence
    segment: Segment
    last: bool
    row: int
    looked_at: slice


class Outcome:
    """Of one run.

    Args:
        sequences: of the segments; their tokens are those that were known before the run.
        draws: whether the runner drew the tokens.
    """

    def __init__(
        self,
        sequences: Sequence[LiveSequence],
        segments: Sequence[Segment],
        ran: Ran,
        draws: bool,
    ) -> None:
        self._draws, self._shares = draws, ran.shares
        self._parts: list[_Part] = []
        rows: list[int] = []
        behind = 0
        for sequence, segment in zip(sequences, segments, strict=True):
            first, behind = behind, behind + segment.wanted
            looked_at = [] if draws and sequence.only_tokens else range(first, behind)
            place = slice(len(rows), len(rows) + len(looked_at))
            rows += looked_at
            last = segment.start + len(segment.tokens) == len(sequence.tokens)
            self._parts.append(_Part(sequence, segment, last, behind - 1, place))
        self._logits_WV, self._tokens = ran.logits_WV, None
        self._scored: HostCopy | None = None
        if draws:
            if ran.tokens_W is not None:
                self._tokens = HostCopy(ran.tokens_W.clone())
            if rows:
                chosen = host_to(ran.logits_WV.device, torch.tensor(rows))
                self._scored = HostCopy(ran.logits_WV.index_select(0, chosen))

    @property
    def getting(self) -> Iterator[LiveSequence]:
        """Those that get a token."""
        for part in self._parts:
            if part.last and part.sequence.request.params.max_tokens:
                yield part.sequence

    def drawn(self) -> Iterator[Drawn]:
        """Notes the scores of prompts in passing. Waits for the run, and for nothing else."""
        return self._drawn_there() if self._draws else self._drawn_here()

    @property
    def active(self) -> Iterator[tuple[LiveSequence, int, float]]:
        """Sequences at a level that skips inputs, their rows and the share that counted."""
        for part, share in zip(self._parts, self._shares(), strict=True):
            if share is not None:
                yield part.sequence, len(part.segment.tokens), share

    def _drawn_there(self) -> Iterator[Drawn]:
        tokens = [] if self._tokens is None else self._tokens.wait().tolist()
        logits_WV = None if self._scored is None else self._scored.wait()
        for sequence, segment, last, row, looked_at in self._parts:
            rows_TV = None if logits_WV is None else logits_WV[looked_at]
            if rows_TV is not None:
                _score_prompt(sequence, segment, rows_TV, last)
            if not last:
                continue
            if sequence.request.params.max_tokens == 0:
                yield Drawn(sequence)
            elif tokens[row] == NOTHING:
                yield Drawn(sequence, error=NO_NUMBER)
            else:
                sequence.sampler.note(tokens[row])
                yield Drawn(sequence, tokens[row], _score(sequence, rows_TV, tokens[row]))

    def _drawn_here(self) -> Iterator[Drawn]:
        logits_WV = self._logits_WV
        if not all(_only_greedy(part.sequence) for part in self._parts if part.segment.wanted):
            logits_WV = logits_WV.cpu()  # all of them at once
        values, greedy = _largest(logits_WV)
        for sequence, segment, last, row, looked_at in self._parts:
            rows_TV = logits_WV[looked_at]
            _score_prompt(sequence, segment, rows_TV, last)
            if not last:
                continue
            if sequence.request.params.max_tokens == 0:
                yield Drawn(sequence)
                continue
            try:
                plain = sequence.sampler.plain and not math.isnan(values[row])
                token = greedy[row] if plain else sequence.sampler(rows_TV[-1])
            except ValueError as error:
                yield Drawn(sequence, error=str(error))
                continue
            yield Drawn(sequence, token, _score(sequence, rows_TV, token))


def _only_greedy(sequence: LiveSequence) -> bool:
    """Whether nothing but the largest of a sequence's logits is looked at."""
    return sequence.sampler.plain and sequence.only_tokens


def _largest(logits_WV: Tensor) -> tuple[list[float], list[int]]:
    """Of each row the largest logit and its token, the lowest of equals."""
    if not len(logits_WV):
        return [], []
    # as argmax, which takes four times as long in bfloat16; doubles hold both exactly
    values_W, tokens_W = logits_WV.max(-1)
    values, tokens = torch.stack([values_W.double(), tokens_W.double()]).tolist()
    return values, [int(token) for token in tokens]


def _score_prompt(sequence: LiveSequence, segment: Segment, logits_TV: Tensor, last: bool) -> None:
    """Scores of the prompt's tokens behind the rows at the end of a segment, if there are some."""
    if len(logits_TV) <= last:
        return
    end = segment.start + len(segment.tokens)
    first = end - len(logits_TV) + 1
    tokens = sequence.tokens[first : min(end + 1, sequence.prompt_tokens)]
    sequence.scores += _scores(sequence, logits_TV[: len(tokens)], tokens)


def _score(sequence: LiveSequence, logits_TV: Tensor | None, token: int) -> ScoredToken | None:
    """Of a token drawn behind the last of the rows."""
    if sequence.request.logprobs is None:
        return None
    assert logits_TV is not None
    return _scores(sequence, logits_TV[-1:], [token])[0]


def _scores(sequence: LiveSequence, logits_TV: Tensor, tokens: Sequence[int]) -> list[ScoredToken]:
    """Of tokens by the model's own logits [T, V]."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    count = sequence.request.logprobs or 0
    found = []
    for token, logprobs_V in zip(tokens, logprobs_TV, strict=True):
        values, ids = logprobs_V.topk(count)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(ScoredToken(token, float(logprobs_V[token]), top))
    return found
