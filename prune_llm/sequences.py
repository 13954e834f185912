"""Sequences that run together: what is asked, what comes back, and how far each has got.

Positions count the tokens of prompt and answer from 0. The row of a position computes its keys and
values, and the logits of the token behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_llm.activation.levels import DENSE
from prune_llm.pages import FIRST, page_key
from prune_llm.sampling import DRAWN, Sampler, SamplingParams


@dataclass(frozen=True)
class SequenceRequest:
    """One prompt to continue.

    Attributes:
        id: unique among those that wait or run.
        ids: the prompt's tokens.
        params: see `SamplingParams`; stop texts are left to those who know text.
        level: of activation sparsity, for the tokens behind the prompt.
        logprobs: alternatives to report for each token; 0: only the token's own; None: nothing.
        prompt_logprobs: report the prompt's tokens as well.
    """

    id: str
    ids: tuple[int, ...]
    params: SamplingParams
    level: str = DENSE
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its log-probability by the model's own logits, before anything adjusts them.

    Attributes:
        logprob: None for the first token of a prompt.
        top: the most likely tokens at its place, as asked, likeliest first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """What a step did for one sequence.

    Attributes:
        token: that was drawn; None where only the prompt was asked for.
        score: of the token, if asked.
        prompt: of the prompt's tokens, in the first event, if asked.
        finish_reason: "stop" (an end token) or "length" in the last event, else None.
        cached_tokens: of the prompt that were not computed for it; in the first event.
        active: share of the linears' inputs that counted behind the prompt, in the last event, at
            a level that skips some; see `Ran.active`.
        error: why the sequence ended without a token.
    """

    id: str
    token: int | None
    score: ScoredToken | None = None
    prompt: tuple[ScoredToken, ...] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    active: float | None = None
    error: str | None = None


@dataclass(eq=False, slots=True)
class LiveSequence:
    """A request on its way.

    Attributes:
        tokens: prompt and answer; those that were not read yet are DRAWN.
        pending: how many these are, at the end.
        computed: tokens whose keys and values lie in the cache.
        pages: where they lie. registered: how many of those are known under their key, or were
            adopted.
        slot: among the running; None: waits. joined: it ran before.
        cached: tokens of the prompt that were adopted.
        scores: of the prompt's tokens so far. asked: how many of them were asked of a run.
        active_rows: behind the prompt; active_sum: over them, of the shares that counted.
    """

    request: SequenceRequest
    sampler: Sampler
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    registered: int = 0
    slot: int | None = None
    joined: bool = False
    cached: int = 0
    pending: int = 0
    scores: list[ScoredToken] = field(default_factory=list)
    asked: int = 0
    active_rows: int = 0
    active_sum: float = 0.0
    _keys: list[bytes] = field(default_factory=list)

    @staticmethod
    def of(request: SequenceRequest) -> LiveSequence:
        sequence = LiveSequence(request, Sampler(request.params, request.ids), list(request.ids))
        if request.prompt_logprobs:
            sequence.scores.append(ScoredToken(request.ids[0], None))
            sequence.asked = 1
        return sequence

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.ids)

    @property
    def started(self) -> bool:
        """Whether its first token was drawn."""
        return len(self.tokens) > self.prompt_tokens

    @property
    def known(self) -> int:
        """Tokens that are drawn and read."""
        return len(self.tokens) - self.pending

    @property
    def most_tokens(self) -> int:
        """That the cache may have to hold: the last one drawn is never computed."""
        return self.prompt_tokens + max(0, self.request.params.max_tokens - 1)

    @property
    def wanted_from(self) -> int:
        """The first position whose logits are still needed."""
        if self.request.prompt_logprobs and self.asked < self.prompt_tokens:
            return self.asked - 1
        return len(self.tokens) - 1

    @property
    def only_tokens(self) -> bool:
        """Whether nothing of its logits is looked at but to draw the next token."""
        request = self.request
        scored = request.logprobs is not None or request.prompt_logprobs
        return not scored and request.params.max_tokens > 0

    @property
    def shareable(self) -> int:
        """Tokens whose keys and values any other sequence of the same tokens has too."""
        return self.known if self.request.level == DENSE else self.prompt_tokens

    @property
    def active(self) -> float | None:
        return self.active_sum / self.active_rows if self.active_rows else None

    def key(self, index: int, page_size: int) -> bytes:
        """Of the page ``index``, which must be full and shareable."""
        while len(self._keys) <= index:
            start = len(self._keys) * page_size
            previous = self._keys[-1] if self._keys else FIRST
            self._keys.append(page_key(previous, self.tokens[start : start + page_size]))
        return self._keys[index]

    def draw(self) -> None:
        """A run was asked for the next token."""
        self.tokens.append(DRAWN)
        self.pending += 1

    def note(self, token: int) -> None:
        """The first of the pending ones is read."""
        self.tokens[self.known] = token
        self.pending -= 1

    def restart(self) -> None:
        """Nothing of it is in the cache any more."""
        self.computed = self.registered = 0
        self.pages, self.slot = [], None
        if not self.started:
            self.cached = 0
