"""An engine without a model: bytes are tokens, and what follows is a function of what is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_llm.generation import StopWatch
from prune_llm_server.engine import (
    Answer,
    Busy,
    Candidate,
    EngineInfo,
    EngineRequest,
    EngineStatus,
    TokenReport,
    Unavailable,
)

OFFSET = 2  # <s> and </s> come before the bytes


def encode(text: str) -> tuple[int, ...]:
    return tuple(byte + OFFSET for byte in text.encode())


def following(ids: Sequence[int], seed: int = 0) -> int:
    """The token, a capital letter, that comes behind these."""
    return OFFSET + 65 + (sum(ids) * 31 + len(ids) * 7 + seed) % 26


def continuation(ids: Sequence[int], tokens: int, seed: int = 0) -> str:
    """The text a request gets."""
    have = list(ids)
    for _ in range(tokens):
        have.append(following(have, seed))
    return bytes(token - OFFSET for token in have[len(ids) :]).decode()


def _text(token: int) -> str:
    return f"<{token}>" if token < OFFSET else bytes([token - OFFSET]).decode(errors="replace")


def _bytes(token: int) -> tuple[int, ...] | None:
    return None if token < OFFSET else (token - OFFSET,)


def report(ids: Sequence[int], token: int, top: int, seed: int = 0) -> TokenReport:
    """As if the following token had e^-0.1 and others e^-2, e^-2.1, ..."""
    likeliest = following(ids, seed)
    order = [likeliest, *(t for t in range(258) if t != likeliest)]
    logprobs = {t: -0.1 if i == 0 else -2 - 0.1 * i for i, t in enumerate(order)}
    candidates = tuple(Candidate(t, _text(t), _bytes(t), logprobs[t]) for t in order[:top])
    return TokenReport(token, _text(token), _bytes(token), logprobs[token], candidates)


@dataclass
class FakeEngine:
    """Answers deterministically, and misbehaves as told.

    Attributes:
        step_seconds: between tokens. width: letters of text for each token.
        errors: raised before the token of this number, by number.
        capacity: requests at once; more are Busy.
        opened, cancelled: requests begun, and closed before their end.
    """

    context: int = 256
    step_seconds: float = 0.0
    width: int = 1
    errors: dict[int, Exception] = field(default_factory=dict)
    capacity: int = 1000
    loaded: bool = True
    healthy: bool = True
    start_error: Exception | None = None
    start_seconds: float = 0.0
    opened: int = 0
    cancelled: int = 0
    running: int = 0
    stopped: int = 0
    requests: list[EngineRequest] = field(default_factory=list)

    @property
    def info(self) -> EngineInfo:
        if not self.loaded:
            raise Unavailable("the model is loading")
        return EngineInfo(
            model="tiny/fake",
            created=1_700_000_000,
            context=self.context,
            vocabulary=258,
            levels=("dense", "40%", "50%"),
            chat=True,
            details={"cache_bytes": 10**9, "threads": 1},
        )

    def status(self) -> EngineStatus:
        return EngineStatus(
            ready=self.loaded,
            healthy=self.healthy,
            reason="" if self.loaded and self.healthy else "as the test wants it",
            running=self.running,
            waiting=3,
            cache_used=0.25,
            restarts=2,
            preemptions=4,
            cached_tokens=50,
            prompt_tokens=200,
        )

    async def start(self) -> None:
        await asyncio.sleep(self.start_seconds)
        if self.start_error is not None:
            raise self.start_error
        self.loaded = True

    async def stop(self) -> None:
        self.stopped += 1

    async def encode(self, prompt: str) -> tuple[int, ...]:
        return encode(prompt)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if messages[0]["role"] == "assistant":
            raise ValueError("the template wants a user's message first")
        return encode("".join(f"<{m['role']}>{m['content']}" for m in messages))

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Answer, None]:
        if self.running >= self.capacity:
            raise Busy("the queue is full", retry_after=1.5)
        self.requests.append(request)
        self.opened += 1
        self.running += 1
        whole = False
        try:
            async for answer in self._answers(request):
                whole = answer.finish_reason is not None
                yield answer
        except Exception:
            whole = True
            raise
        finally:
            self.running -= 1
            self.cancelled += not whole

    async def _answers(self, request: EngineRequest) -> AsyncGenerator[Answer, None]:
        params, have = request.params, list(request.ids)
        seed = (params.seed or 0) if params.temperature else 0
        top = request.logprobs or 0
        stops = StopWatch(params.stop)
        prompt = ()
        if request.prompt_logprobs:
            first = TokenReport(have[0], _text(have[0]), _bytes(have[0]), None)
            rest = (report(have[:i], have[i], top) for i in range(1, len(have)))
            prompt = (first, *rest)
        cached = len(have) // 2
        active = None if request.level == "dense" else 1 - float(request.level[:-1]) / 100
        if params.max_tokens == 0:
            yield Answer("", 0, (), prompt, "length", cached, active, 0.5, 0.25)
        for number in range(params.max_tokens):
            await asyncio.sleep(self.step_seconds)
            if number in self.errors:
                raise self.errors[number]
            token = following(have, seed)
            reports = () if request.logprobs is None else (report(have, token, top, seed),)
            have.append(token)
            last = number + 1 == params.max_tokens
            stopped = stops.add(_text(token) * self.width, last)
            reason = "stop" if stopped else "length" if last else None
            waited = (None, None) if number else (0.5, 0.25)
            share = active if reason else None
            yield Answer(stops.take(), 1, reports, prompt, reason, cached, share, *waited)
            prompt, cached = (), 0
            if reason:
                return
