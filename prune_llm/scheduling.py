"""Whose rows run in a step, and on which pages: first come, first served.

Sequences are kept in the order of their arrival, and all that run came before all that wait. A
sequence adopts the next full page of its tokens where one exists, also one that an earlier
sequence fills in the same step: all rows are stored, layer by layer, before any is attended to.
When pages run out, the youngest gives its own back and waits again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from prune_llm.pages import PagePool
from prune_llm.segments import SCORED_ROWS, Runner, Segment
from prune_llm.sequences import LiveSequence


@dataclass
class _Step:
    """A step being put together.

    Attributes:
        rows_left: of prompts; scored_left: of prompts whose tokens are scored.
        full: a sequence got no page; nobody may join.
    """

    rows_left: int
    scored_left: int = SCORED_ROWS
    segments: list[Segment] = field(default_factory=list)
    full: bool = False


class Scheduler:
    """Waiting and running sequences and the pages of the cache."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._page_size = runner.limits.page_size
        self._chunk = max(runner.limits.chunk_tokens, runner.piece)
        self._free_slots = list(range(runner.limits.max_rows))
        self.pool = PagePool(runner.pages)
        self.running: list[LiveSequence] = []
        self.waiting: deque[LiveSequence] = deque()
        self.preemptions = 0

    def add(self, sequence: LiveSequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: LiveSequence) -> None:
        """Ended or cancelled: its pages are free at once."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._vacate(sequence)

    def next_segments(self) -> list[Segment]:
        """The rows of a step, which are taken as computed from here on; [] only where none is left
        but those of tokens that were not read yet.

        The oldest sequence always gets rows: the younger ones give it their pages.
        """
        step = _Step(self._chunk)
        for sequence in self.running.copy():
            if sequence.slot is not None:  # an older one may have taken its pages
                self._plan(sequence, step)
        while self._can_join(step):
            sequence = self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            self._plan(sequence, step)
        return step.segments

    def _can_join(self, step: _Step) -> bool:
        if step.full or step.rows_left < 1 or not (self.waiting and self._free_slots):
            return False
        # a preempted one may still wait for a token that nobody else knows
        return not self.waiting[0].pending and self._fits(self.waiting[0])

    def _fits(self, sequence: LiveSequence) -> bool:
        """Whether there are pages for its tokens and the next, beside those it would adopt."""
        size, tokens = self._page_size, len(sequence.tokens)
        needed = -(-min(tokens + 1, sequence.most_tokens) // size)
        if self._runner.shares:
            for index in range(sequence.shareable // size):
                if not self.pool.is_held(sequence.key(index, size)):
                    break
                needed -= 1
        return needed <= self.pool.available

    def _plan(self, sequence: LiveSequence, step: _Step) -> None:
        """Put the rows of a sequence into the step, as many as it may have."""
        if self._runner.shares:
            self._register(sequence)  # tokens that were read meanwhile
        while sequence.computed < min(len(sequence.tokens), sequence.most_tokens):
            if self._runner.shares:
                self._adopt(sequence)
            start, end = sequence.computed, self._end(sequence, step)
            if end <= start:
                return
            if not self._extend(sequence, end):
                step.full = True
                return
            self._take_rows(sequence, end, step)
            sequence.computed = end
            if self._runner.shares:
                self._register(sequence)

    def _end(self, sequence: LiveSequence, step: _Step) -> int:
        """Up to where its next rows go in one segment."""
        start, known, size = sequence.computed, len(sequence.tokens), self._page_size
        in_prompt = start < sequence.prompt_tokens
        if start + 1 == known and not in_prompt:
            return known
        limit = sequence.prompt_tokens if in_prompt else known
        end = min(limit, start + step.rows_left)
        if sequence.wanted_from < known - 1:
            end = min(end, max(start, sequence.wanted_from) + step.scored_left)
        if self._runner.shares:  # the page behind may be there to be adopted
            end = min(end, (start // size + 1) * size)
        return end if end == limit else end - end % self._runner.piece

    def _take_rows(self, sequence: LiveSequence, end: int, step: _Step) -> None:
        start, known, request = sequence.computed, len(sequence.tokens), sequence.request
        in_prompt = start < sequence.prompt_tokens
        wanted = max(0, end - max(start, sequence.wanted_from))
        if in_prompt or end - start > 1 or end < known:
            step.rows_left -= end - start
        if sequence.wanted_from < known - 1:
            step.scored_left -= wanted
            sequence.asked = min(sequence.asked + wanted, sequence.prompt_tokens)
        assert sequence.slot is not None
        step.segments.append(
            Segment(
                sequence.slot,
                start,
                sequence.tokens[start:end],
                None if in_prompt else request.level,
                wanted,
                sequence.pages,
                sequence.sampler if end == known and request.params.max_tokens else None,
            )
        )

    def _adopt(self, sequence: LiveSequence) -> None:
        """Take over the pages that exist of the tokens that come next.

        Where the last row's logits are wanted, that row alone is computed again; it writes what the
        page already holds.
        """
        size = self._page_size
        while len(sequence.pages) * size == sequence.computed:
            start = sequence.computed
            if start >= sequence.wanted_from or start + size > sequence.shareable:
                return
            page = self.pool.adopt(sequence.key(start // size, size))
            if page is None:
                return
            sequence.pages.append(page)
            sequence.registered += 1
            sequence.computed = min(start + size, sequence.wanted_from)
            if not sequence.started:
                sequence.cached += sequence.computed - start

    def _register(self, sequence: LiveSequence) -> None:
        """Let others adopt the pages that are full now."""
        size = self._page_size
        while (sequence.registered + 1) * size <= min(sequence.computed, sequence.shareable):
            index = sequence.registered
            self.pool.register(sequence.pages[index], sequence.key(index, size))
            sequence.registered += 1

    def _extend(self, sequence: LiveSequence, end: int) -> bool:
        """Pages for the tokens before ``end``; whether there are enough."""
        while len(sequence.pages) * self._page_size < end:
            page = self.pool.take()
            if page is not None:
                sequence.pages.append(page)
            elif self.running[-1] is sequence:  # it waits for the older ones, with what it has
                return False
            else:
                self._preempt(self.running.pop())
        return True

    def _preempt(self, sequence: LiveSequence) -> None:
        """Of the younger ones, which have no rows in this step yet."""
        self._vacate(sequence)
        sequence.restart()
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _vacate(self, sequence: LiveSequence) -> None:
        assert sequence.slot is not None
        self.pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        self._runner.leave(sequence.slot)
