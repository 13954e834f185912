"""Continuous batching: sequences join and leave between steps, and one step serves them all.

A plain loop over small pieces: no thread, no clock, no text.
"""

from __future__ import annotations

from dataclasses import dataclass

from prune_llm.outcomes import Drawn, Outcome
from prune_llm.sampling import no_embedding
from prune_llm.scheduling import Scheduler
from prune_llm.segments import Runner
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
        self._launched: Outcome | None = None  # by a step whose tokens were not read yet
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

        A runner that draws is not waited for: these rows are launched, and what came of those of
        the last step is read. A row launched behind a token that ends its sequence is for nothing.

        If this raises, what the cache holds is unknown, and the batcher must not be used again.
        """
        outcome = self._launch()
        if self._runner.draws:
            outcome, self._launched = self._launched, outcome
        return [] if outcome is None else self._read(outcome)

    def _launch(self) -> Outcome | None:
        """Run some rows; None: there are none but those of tokens that were not read yet."""
        segments = self._scheduler.next_segments()
        self.joined = []
        if not segments:
            assert self.idle or self._launched is not None
            return None
        by_slot = {sequence.slot: sequence for sequence in self._scheduler.running}
        sequences = [by_slot[segment.slot] for segment in segments]
        ran = self._runner.run(segments)
        for sequence, segment in zip(sequences, segments, strict=True):
            self._rows += len(segment.tokens)
            if not sequence.joined:
                sequence.joined = True
                self.joined.append(sequence.request.id)
        outcome = Outcome(sequences, segments, ran, self._runner.draws)
        for sequence in outcome.getting:
            sequence.draw()
        return outcome

    def _read(self, outcome: Outcome) -> list[SequenceEvent]:
        drawn_all = list(outcome.drawn())  # waits for the device, and nothing else
        for sequence, rows, share in outcome.active:
            sequence.active_rows += rows
            sequence.active_sum += share * rows
        return [self._event(drawn) for drawn in drawn_all if self._lives(drawn.sequence)]

    def _lives(self, sequence: LiveSequence) -> bool:
        """Whether it did not end, and nobody cancelled it, since its rows ran."""
        return self._by_id.get(sequence.request.id) is sequence

    def _event(self, drawn: Drawn) -> SequenceEvent:
        sequence, token, error = drawn.sequence, drawn.token, drawn.error
        if token is not None and token >= self._runner.vocabulary:
            error = no_embedding(token, self._runner.vocabulary)
        if error is None:
            return self._advance(sequence, token, drawn.score)
        self.cancel(sequence.request.id)
        return SequenceEvent(sequence.request.id, None, error=error)

    def _advance(
        self, sequence: LiveSequence, token: int | None, score: ScoredToken | None
    ) -> SequenceEvent:
        """Add a drawn token to its sequence, which may end with it."""
        request, first = sequence.request, sequence.known == sequence.prompt_tokens
        params = request.params
        if token is not None:
            sequence.note(token)
        if first:
            self._prompt_tokens += sequence.prompt_tokens
            self._cached_tokens += sequence.cached
        ended = token in self._ends and not params.ignore_eos
        full = sequence.known - sequence.prompt_tokens == params.max_tokens
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
