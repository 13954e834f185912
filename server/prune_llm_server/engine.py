"""What the HTTP application needs of an engine: text in, pieces of text out. It knows no model.

The application calls everything from one event loop. An engine that runs elsewhere (a process, a
thread) hides that behind these methods.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prune_llm.sampling import SamplingParams


class EngineError(Exception):
    """Why a request was not answered; the message is one line for the client."""


class Busy(EngineError):
    """The queue is full. ``retry_after``: seconds after which to try again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(EngineError):
    """It is loading, draining or gone: nothing was computed."""


class Failed(EngineError):
    """It died while the request was running."""


class TimeLimit(EngineError):
    """The request's time was over before its answer was whole."""


@dataclass(frozen=True)
class EngineInfo:
    """What is served.

    Attributes:
        model: the name under which clients ask for it.
        created: Unix time of the checkpoint.
        context: most tokens of prompt and answer together.
        vocabulary: token ids are below it.
        levels: of activation sparsity, "dense" first; default_level: for requests that name none.
        chat: whether there is a chat template.
        sampling: what the model's generation_config.json asks for where a request says nothing.
        details: plain facts for /version and logs: sparsity, threads, bytes of the cache, ...
    """

    model: str
    created: int
    context: int
    vocabulary: int
    levels: tuple[str, ...] = ("dense",)
    default_level: str = "dense"
    chat: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to continue.

    Attributes:
        id: unique; cancels it and names it in logs.
        ids: the prompt's tokens.
        params: see `SamplingParams`; max_tokens 0 asks for the prompt's log-probabilities only.
        level: of activation sparsity.
        logprobs: alternatives to report for each token; 0: only the token's own; None: nothing.
        prompt_logprobs: report the prompt's tokens as well.
        seconds: it may take, waiting included; None: as long as it needs.
    """

    id: str
    ids: tuple[int, ...]
    params: SamplingParams
    level: str = "dense"
    logprobs: int | None = None
    prompt_logprobs: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A token as clients see it: its text (with U+FFFD inside a character), and its bytes where the
    vocabulary tells them."""

    id: int
    text: str
    bytes: tuple[int, ...] | None
    logprob: float


@dataclass(frozen=True)
class TokenReport:
    """A token that was drawn, or one of the prompt (its first has no log-probability: None), and
    the most likely ones at its place, likeliest first."""

    id: int
    text: str
    bytes: tuple[int, ...] | None
    logprob: float | None
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What is new since the last one.

    Attributes:
        text: certain, never half a character, never part of a stop text.
        tokens: how many were drawn since the last one; what they are, where logprobs were asked.
        reports: of those tokens, if logprobs were asked for.
        prompt: reports of the prompt's tokens, in the first answer, if asked for.
        finish_reason: "stop" or "length" in the last answer, else None.
        cached_tokens: of the prompt that were not computed again; in the first answer.
        active: share of the linears' inputs that counted, in the last answer, at a level that
            skips some.
        queue_seconds: until its first token of the prompt was computed; prefill_seconds: from there
            to its first answer, where both are.
    """

    text: str
    tokens: int
    reports: tuple[TokenReport, ...] = ()
    prompt: tuple[TokenReport, ...] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    active: float | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None


@dataclass(frozen=True)
class EngineStatus:
    """How it is, for health checks and metrics.

    Attributes:
        ready: it loaded and answers.
        healthy: it is not dead and made progress lately; ``reason`` says what is wrong.
        waiting, running: requests. cache_used: share of the cache's pages in use.
        restarts: how often a dead engine was replaced.
        preemptions: sequences that gave their pages back and were computed again.
        cached_tokens: of all prompts so far, not computed again; prompt_tokens: all of them.
    """

    ready: bool
    healthy: bool
    reason: str = ""
    waiting: int = 0
    running: int = 0
    cache_used: float = 0.0
    restarts: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0


class Engine(Protocol):
    """Answers many requests at once."""

    @property
    def info(self) -> EngineInfo:
        """Raises Unavailable until it has loaded."""

    def status(self) -> EngineStatus: ...

    async def start(self) -> None:
        """Load and warm up; returns when ready. Raises EngineError or ValueError if it cannot."""

    async def stop(self) -> None:
        """End at once; running requests fail. Idempotent."""

    async def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a text, with the tokens that begin one.

        Raises:
            ValueError: there are none: the text is empty, and nothing begins it.
        """

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of messages by the chat template, up to where the answer begins.

        Raises:
            ValueError: no template, or it refuses the messages.
        """

    def stream(self, request: EngineRequest) -> AsyncIterator[Answer]:
        """The answer as it comes. Closing the iterator cancels the request.

        Raises:
            Busy, Unavailable, Failed, TimeLimit: on the first step or any later one.
            ValueError: a token id or level that does not exist, a prompt that is too long.
        """
