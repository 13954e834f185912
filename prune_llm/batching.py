"""Continuous batching: sequences join and leave between steps, and one step serves them all.

A plain loop over small pieces: no thread, no clock, no text. Shape letters: W = rows whose logits
are wanted, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prune_llm.sampling import NO_NUMBER, NOTHING, Sampler
from prune_llm.scheduling import Scheduler
from prune_llm.segments import Ran, Runner, Segment
from prune_llm.sequences import LiveSequence, ScoredToken, SequenceEvent, SequenceRequest


@dataclass(frozen=True)
class BatchStatus:
    """Counts, for health checks and metrics.

    Attributes:
        waiting, running: sequences.
        pages_held: by the running ones, of ``pages``; pages_idle: kept for whoever adopts them.
        preemptions: times that a sequence gave its pages back.
        rows: computed so far.
        prompt_tokens, cached_tokens: of the prompts answered so far: all, and those adopted.
    """

    waiting: int
    running: int
    pages: int
    pages_held: int
    pages_idle: int
    preemptions: int
    rows: int
    prompt_tokens: int
    cached_tokens: int


class Batcher:
    """Runs many sequences at once.

    Args:
        ends: tokens that end an answer, unless its request ignores them.

    Attributes:
        joined: ids of the sequences whose first rows the last step ran.
    """

    def __init__(self, runner: Runner, ends: frozenset[int] = frozenset()) -> None:
        self._runner, self._ends = runner, ends
        self._scheduler = Scheduler(runner)
        self._by_id: dict[str, LiveSequence] = {}
        self._rows = self._prompt_tokens = self._cached_tokens = 0
        self.joined: list[str] = []

    @property
    def idle(self) -> bool:
        return not self._by_id

    @property
    def status(self) -> BatchStatus:
        scheduler = self._scheduler
        return BatchStatus(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            pages=scheduler.pool.pages,
            pages_held=scheduler.pool.held,
            pages_idle=scheduler.pool.idle,
            preemptions=scheduler.preemptions,
            rows=self._rows,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )

    def add(self, request: SequenceRequest) -> None:
        """Let a sequence wait for its turn.

        Raises:
            ValueError: it asks for what the model does not have, or could never fit.
        """
        if request.id in self._by_id:
            raise ValueError(f"id {request.id!r}: is already waiting or running")
        check_request(request, self._runner)
        sequence = LiveSequence.of(request)
        self._by_id[request.id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, id: str) -> bool:
        """Forget a sequence and free its pages at once; False: it neither waits nor runs."""
        sequence = self._by_id.pop(id, None)
        if sequence is not None:
            self._scheduler.remove(sequence)
        return sequence is not None

    def step(self) -> list[SequenceEvent]:
        """Run some rows; what came of them, for the sequences that got a token or ended.

        If this raises, what the cache holds is unknown, and the batcher must not be used again.
        """
        segments = self._scheduler.next_segments()
        self.joined = []
        if not segments:
            assert self.idle
            return []
        by_slot = {sequence.slot: sequence for sequence in self._scheduler.running}
        sequences = [by_slot[segment.slot] for segment in segments]
        ran = self._runner.run(segments)
        drawn_all = list(_draw(sequences, segments, ran))  # waits for the device, and nothing else
        for sequence, segment, share in zip(sequences, segments, ran.active, strict=True):
            self._rows += len(segment.tokens)
            if not sequence.joined:
                sequence.joined = True
                self.joined.append(sequence.request.id)
            if share is not None:
                sequence.active_rows += len(segment.tokens)
                sequence.active_sum += share * len(segment.tokens)
        events = []
        for sequence, drawn, score in drawn_all:
            if isinstance(drawn, ValueError):
                self.cancel(sequence.request.id)
                events.append(SequenceEvent(sequence.request.id, None, error=str(drawn)))
            else:
                events.append(self._advance(sequence, drawn, score))
        return events

    def _advance(
        self, sequence: LiveSequence, token: int | None, score: ScoredToken | None
    ) -> SequenceEvent:
        """Add a drawn token to its sequence, which may end with it."""
        request, first = sequence.request, not sequence.started
        params = request.params
        if token is not None:
            sequence.tokens.append(token)
        if first:
            self._prompt_tokens += sequence.prompt_tokens
            self._cached_tokens += sequence.cached
        ended = token in self._ends and not params.ignore_eos
        full = len(sequence.tokens) - sequence.prompt_tokens == params.max_tokens
        reason = "stop" if ended else "length" if full else None
        if reason is not None:
            self.cancel(request.id)
        return SequenceEvent(
            request.id,
            token,
            score,
            tuple(sequence.scores) if first else (),
            reason,
            sequence.cached if first else 0,
            None if reason is None else sequence.active,
        )


def check_request(request: SequenceRequest, runner: Runner) -> None:
    """Raise ValueError unless a runner can serve a request when it has nothing else to do."""
    ids, params, vocabulary = request.ids, request.params, runner.vocabulary
    if not ids:
        raise ValueError("prompt: is empty; give at least one token")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise ValueError(f"prompt: token ids must lie in [0, {vocabulary})")
    strange = [token for token in params.logit_bias if token >= vocabulary]
    if strange:
        raise ValueError(f"logit_bias {strange[0]}: token ids must lie in [0, {vocabulary})")
    if request.logprobs is not None and not 0 <= request.logprobs <= vocabulary:
        raise ValueError(f"logprobs {request.logprobs}: must be between 0 and {vocabulary}")
    if request.level not in runner.levels:
        known = ", ".join(runner.levels)
        raise ValueError(f"level {request.level!r}: does not exist; this model has {known}")
    room = runner.context
    if len(ids) + params.max_tokens > room:
        raise ValueError(
            f"prompt of {len(ids)} tokens and max_tokens {params.max_tokens}: the model's context "
            f"is {room}"
        )
    # the last token drawn is never computed
    room = runner.pages * runner.limits.page_size + 1
    if len(ids) + max(1, params.max_tokens) > room:
        raise ValueError(
            f"prompt of {len(ids)} tokens and max_tokens {params.max_tokens}: the cache has room "
            f"for {room}; ask for less or give it more memory"
        )


# a sequence, the token it got (None: only its prompt was asked for) or why there is none, and the
# token's score if asked
_Drawn = tuple[LiveSequence, int | ValueError | None, ScoredToken | None]


def _draw(
    sequences: Sequence[LiveSequence], segments: Sequence[Segment], ran: Ran
) -> Iterator[_Drawn]:
    """Score the prompts' tokens and draw the next one of every sequence that is computed so far."""
    there = None if ran.tokens_W is None else ran.tokens_W.tolist()  # a GPU is waited for here
    left = [
        sequence
        for sequence, segment in zip(sequences, segments, strict=True)
        if segment.wanted and (there is None or segment.sampler is None)
    ]
    logits_WV, row = ran.logits_WV, 0
    if not all(map(_only_greedy, left)):
        logits_WV = logits_WV.cpu()  # all of them at once
    values, greedy = _largest(logits_WV) if left else ([], [])
    for sequence, segment in zip(sequences, segments, strict=True):
        end = segment.start + len(segment.tokens)
        last = end == len(sequence.tokens)
        rows_TV = logits_WV[row : row + segment.wanted]
        row += segment.wanted
        if len(rows_TV) > last:
            _score_prompt(sequence, rows_TV, end)
        if not last:
            continue
        if sequence.request.params.max_tokens == 0:
            yield sequence, None, None
            continue
        if there is not None and segment.sampler is not None:
            yield sequence, _noted(segment.sampler, there[row - 1]), None
            continue
        try:
            plain = sequence.sampler.plain and not math.isnan(values[row - 1])
            token = greedy[row - 1] if plain else sequence.sampler(rows_TV[-1])
        except ValueError as error:
            yield sequence, error, None
            continue
        scored = sequence.request.logprobs is not None
        yield sequence, token, _scores(sequence, rows_TV[-1:], [token])[0] if scored else None


def _noted(sampler: Sampler, token: int) -> int | ValueError:
    """A token that the device drew."""
    if token == NOTHING:
        return ValueError(NO_NUMBER)
    sampler.note(token)
    return token


def _only_greedy(sequence: LiveSequence) -> bool:
    """Whether nothing but the largest of a sequence's logits is looked at."""
    request = sequence.request
    return sequence.sampler.plain and request.logprobs is None and not request.prompt_logprobs


def _largest(logits_WV: Tensor) -> tuple[list[float], list[int]]:
    """Of each row the largest logit and its token, the lowest of equals."""
    if not len(logits_WV):
        return [], []
    # as argmax, which takes four times as long in bfloat16; doubles hold both exactly
    values_W, tokens_W = logits_WV.max(-1)
    values, tokens = torch.stack([values_W.double(), tokens_W.double()]).tolist()
    return values, [int(token) for token in tokens]


def _score_prompt(sequence: LiveSequence, logits_TV: Tensor, end: int) -> None:
    """Scores of the prompt's tokens behind the rows that end before the position ``end``."""
    first = end - len(logits_TV) + 1
    tokens = sequence.tokens[first : min(end + 1, sequence.prompt_tokens)]
    sequence.scores += _scores(sequence, logits_TV[: len(tokens)], tokens)


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
