"""A closed-loop client of a completions server: so many requests at a time, the next when one ends.

Plain sockets, because on a small machine a client library takes a good part of the processors that
the server needs. One connection a request.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Target:
    """A server and how it is asked.

    Attributes:
        peer: it is `transformers serve`, which takes a generation config, no ignore_eos.
    """

    port: int
    model: str
    peer: bool = False
    host: str = "127.0.0.1"

    def body(self, prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
        """Of a greedy completion of exactly so many tokens, streamed."""
        common = {"model": self.model, "prompt": prompt, "stream": True}
        if self.peer:
            config = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": -1}
            return {**common, "generation_config": json.dumps(config), **fields}
        return {
            **common,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
            **fields,
        }


@dataclass
class Reply:
    """What came back.

    Attributes:
        prompt: number of the prompt. started, ended: on the client's clock, connecting included.
        pieces: when each event with text or a finish came; a server may put two tokens into one.
        tokens, prompt_tokens, cached_tokens: as the server's usage tells; the last may be missing.
        error: why it is not whole; "": it is.
    """

    prompt: int
    started: float
    ended: float = math.nan
    status: int = 0
    text: str = ""
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str | None = None
    retry_after: str = ""
    error: str = "no answer"

    @property
    def first_token_seconds(self) -> float:
        return self.pieces[0] - self.started

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def token_seconds(self) -> float:
        """Mean time of a token behind the first; NaN where there is none."""
        if self.tokens < 2:
            return math.nan
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1)

    def take(self, event: dict[str, Any], now: float) -> None:
        if "error" in event:
            self.error = f"error event: {_message(event)}"
        for choice in event.get("choices", ()):
            text, reason = choice.get("text") or "", choice.get("finish_reason")
            if text or (reason and not self.pieces):
                self.pieces.append(now)
            self.text += text
            self.finish_reason = reason or self.finish_reason
        if usage := event.get("usage"):
            self.tokens, self.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def judge(self) -> None:
        """At the end of the stream: whether it is whole."""
        if self.error == "no answer":
            whole = self.finish_reason is not None and self.tokens > 0
            self.error = "" if whole else "the stream ended early"


class Exchange:
    """A request that was sent: the status, the headers, then the events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self.status = 0
        self.headers: dict[str, str] = {}

    async def head(self) -> None:
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("closed without an answer")
        self.status = int(line.split()[1])
        while (line := await self._reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if self.headers.get("transfer-encoding") != "chunked":
            while data := await self._reader.read(1 << 16):
                yield data
            return
        while size := int(await self._reader.readline() or b"0", 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def text(self) -> str:
        return b"".join([piece async for piece in self._pieces()]).decode(errors="replace")

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        rest = b""
        async for piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n\n")
            for line in lines:
                data = line.removeprefix(b"data: ")
                if data != b"[DONE]":
                    yield json.loads(data)


@asynccontextmanager
async def exchange(
    target: Target, body: dict[str, Any], path: str = "/v1/completions", limit: int = _LINE_BYTES
) -> AsyncIterator[Exchange]:
    """Send a request. ``limit``: bytes read ahead; a slow reader keeps it small."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=limit)
    try:
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {target.host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + data)
        yield Exchange(reader, writer)
    finally:
        writer.close()


async def get(target: Target, path: str) -> tuple[int, str]:
    """Status and text of a GET."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=_LINE_BYTES)
    try:
        request = f"GET {path} HTTP/1.1\r\nHost: {target.host}\r\nConnection: close\r\n\r\n"
        writer.write(request.encode())
        found = Exchange(reader, writer)
        await found.head()
        return found.status, await found.text()
    finally:
        writer.close()


async def ask(
    target: Target, number: int, body: dict[str, Any], seconds: float, pause: float = 0.0
) -> Reply:
    """One streamed completion. ``pause``: read nothing for so long behind the first piece."""
    reply = Reply(number, time.perf_counter())
    try:
        async with (
            asyncio.timeout(seconds),
            exchange(target, body, limit=1 << 10 if pause else _LINE_BYTES) as sent,
        ):
            await sent.head()
            reply.status, reply.retry_after = sent.status, sent.headers.get("retry-after", "")
            if sent.status != 200:
                reply.error = f"status {sent.status}: {_message(json.loads(await sent.text()))}"
            else:
                async for event in sent.events():
                    reply.take(event, time.perf_counter())
                    if pause and reply.pieces:
                        await asyncio.sleep(pause)
                        pause = 0
                reply.judge()
    except TimeoutError:
        reply.error = "no end within the time limit"
    except (OSError, asyncio.IncompleteReadError) as error:
        reply.error = f"connection lost: {type(error).__name__}"
    reply.ended = time.perf_counter()
    return reply


def _message(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    return str(error.get("message", error) if isinstance(error, dict) else error)[:100]


@dataclass
class Load:
    """What a closed loop got between ``began`` and ``deadline``, and what it waited for behind."""

    concurrency: int
    began: float
    deadline: float
    replies: list[Reply] = field(default_factory=list)
    cut: int = 0
    client_share: float = 0.0


async def closed_loop(
    ask_one: Callable[[int], Any],
    prompts: Iterator[int],
    concurrency: int,
    seconds: float,
    grace: float,
) -> Load:
    """Keep so many requests running for ``seconds``; then let them end, for ``grace`` at most.

    ``ask_one(number)`` returns a `Reply`. Requests that are still running behind the grace are cut:
    they count as neither whole nor wrong.
    """
    began = time.perf_counter()
    load = Load(concurrency, began, began + seconds)
    cpu = time.process_time()

    async def work() -> None:
        while time.perf_counter() < load.deadline:
            number = next(prompts, None)
            if number is None:
                return
            reply = await ask_one(number)
            load.replies.append(reply)
            if reply.error:
                await asyncio.sleep(0.1)  # a server that refuses is not to be flooded

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    _, running = await asyncio.wait(workers, timeout=seconds + grace)
    load.client_share = (time.process_time() - cpu) / (time.perf_counter() - began)
    load.cut = len(running)
    for worker in running:
        worker.cancel()
    for result in await asyncio.gather(*workers, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    return load


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest in order, as numpy's default; NaN of nothing."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def tokens_until(reply: Reply, deadline: float) -> float:
    """Tokens of an answer that came before a moment, taken as spread evenly over its pieces."""
    if not reply.pieces:
        return 0.0
    return reply.tokens * sum(at <= deadline for at in reply.pieces) / len(reply.pieces)


def summary(load: Load, alone: dict[int, str]) -> dict[str, Any]:
    """Figures of a load. ``alone``: answers of prompts that were asked alone.

    Tokens count if they came before the deadline; latencies are of all whole answers.
    """
    whole = [reply for reply in load.replies if not reply.error]
    seconds = load.deadline - load.began
    last = max((reply.ended for reply in load.replies), default=load.deadline)
    if not load.cut and last < load.deadline:  # the prompts ran out
        seconds = last - load.began
    tokens = sum(tokens_until(reply, load.deadline) for reply in whole)
    checked = [reply for reply in whole if reply.prompt in alone]
    prompt_tokens = sum(reply.prompt_tokens for reply in whole)
    cached = [reply.cached_tokens for reply in whole if reply.cached_tokens is not None]
    found: dict[str, Any] = {
        "concurrency": load.concurrency,
        "seconds": seconds,
        "whole": len(whole),
        "cut": load.cut,
        "errors": dict(Counter(reply.error for reply in load.replies if reply.error)),
        "checked": len(checked),
        "mismatches": sum(reply.text != alone[reply.prompt] for reply in checked),
        "distinct_answers": len({reply.text for reply in whole}),
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(whole) / seconds,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": sum(reply.tokens for reply in whole),
        "cached_share": sum(cached) / prompt_tokens if cached else None,
        "client_cpu_share": load.client_share,
    }
    for name, values in {
        "ttft": [reply.first_token_seconds for reply in whole],
        "tpot": [reply.token_seconds for reply in whole],
        "e2e": [reply.seconds for reply in whole],
    }.items():
        found[f"{name}_p50"], found[f"{name}_p95"] = (
            percentile(values, 0.5),
            percentile(values, 0.95),
        )
    return found
