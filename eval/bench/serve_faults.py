"""What clients, the system and time do to a server: each case with counts, and what it left behind.

Every case ends in `leftovers`: what still runs, waits or holds cache, file descriptors and memory.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from serve_client import Reply, Target, ask, closed_loop, exchange, get
from serve_inputs import Prompts
from serve_process import (
    Kind,
    Scale,
    Server,
    memory,
    metrics,
    process_tree,
    serving,
    slope,
    until_idle,
)

CASES = ("aborts", "slow readers", "engine killed", "full queue", "SIGTERM")
_IDLE_SECONDS = 60.0
_SETTLE_SECONDS = 10.0


@dataclass
class Stand:
    """What is needed to ask a server and to judge its answers.

    Attributes:
        tokens: of an answer. limit: seconds a request may take.
        alone: answers by the number of the prompt, each asked while nothing else ran.
    """

    kind: Kind
    prompts: Prompts
    tokens: int
    limit: float
    log: Path
    threads: int | None = None
    alone: dict[int, str] = field(default_factory=dict)

    async def ask(self, target: Target, number: int, pause: float = 0.0, **fields: Any) -> Reply:
        body = target.body(self.prompts[number], self.tokens, **fields)
        return await ask(target, number, body, self.limit, pause)

    async def ask_alone(self, count: int) -> None:
        """Answers of the first prompts, one after the other, by a server of their own."""
        async with serving(self.kind, self.log, self.threads) as server:
            for number in range(count):
                reply = await self.ask(server.target, number)
                if reply.error:
                    raise RuntimeError(f"{self.kind.name}, prompt {number}: {reply.error}")
                self.alone[number] = reply.text

    def some(self, chosen: random.Random) -> int:
        return chosen.choice(list(self.alone))

    def judged(self, replies: Iterable[Reply]) -> dict[str, Any]:
        """Counts of replies: whole ones, wrong ones among them, the others by what went wrong."""
        replies = list(replies)
        whole = [reply for reply in replies if not reply.error]
        return {
            "requests": len(replies),
            "whole": len(whole),
            "wrong": sum(reply.text != self.alone[reply.prompt] for reply in whole),
            "errors": dict(Counter(reply.error for reply in replies if reply.error)),
        }


@dataclass(frozen=True)
class Level:
    """Of water in a server: what a case must bring back to where it was."""

    descriptors: int
    server_bytes: int
    engine_bytes: int

    @classmethod
    def of(cls, server: Server) -> Level:
        top, *below = process_tree(server.pid)
        return cls(server.descriptors(), memory(top)[0], sum(memory(p)[0] for p in below))


async def leftovers(server: Server, before: Level) -> dict[str, Any]:
    """When it is idle again: what is still held, and descriptors and memory before and after."""
    found = await until_idle(server.target, _IDLE_SECONDS)
    due = time.monotonic() + _SETTLE_SECONDS
    while server.descriptors() > before.descriptors and time.monotonic() < due:
        await asyncio.sleep(0.2)
    after = Level.of(server)
    return {
        "running": found.get("num_requests_running"),
        "waiting": found.get("num_requests_waiting"),
        "cache_held": found.get("kv_cache_usage_perc"),
        "descriptors": [before.descriptors, after.descriptors],
        "server_mb": [before.server_bytes / 1e6, after.server_bytes / 1e6],
        "engine_mb": [before.engine_bytes / 1e6, after.engine_bytes / 1e6],
    }


async def warm(server: Server, stand: Stand, requests: int = 32) -> Level:
    """Where memory and descriptors stand once every part has been used."""
    numbers = [number % len(stand.alone) for number in range(requests)]
    await asyncio.gather(*(stand.ask(server.target, number) for number in numbers))
    await until_idle(server.target, _IDLE_SECONDS)
    await asyncio.sleep(1)
    return Level.of(server)


# -- clients --------------------------------------------------------------------------------------


async def abort_one(target: Target, stand: Stand, chosen: random.Random) -> str:
    """Ask, and leave at some moment; which one."""
    moment = chosen.choice(["before the answer", "behind its head", "mid-stream", "mid-stream"])
    events = chosen.randint(1, max(1, stand.tokens // 2))
    body = target.body(stand.prompts[stand.some(chosen)], stand.tokens)
    async with asyncio.timeout(stand.limit), exchange(target, body) as sent:
        if moment == "before the answer":
            await asyncio.sleep(chosen.random() * 0.05)
        else:
            await sent.head()
        if moment == "mid-stream":
            async for _ in sent.events():
                events -= 1
                if not events:
                    break
        if chosen.random() < 0.5:
            sent.writer.transport.abort()
    return moment


async def aborts(server: Server, stand: Stand, requests: int, concurrency: int) -> dict[str, Any]:
    """Clients that leave, with a few that stay beside them."""
    before = await warm(server, stand)
    chosen, numbers, left = random.Random(0), iter(range(requests)), Counter[str]()
    stayed: list[Reply] = []

    async def leave() -> None:
        for _ in numbers:
            try:
                left[await abort_one(server.target, stand, chosen)] += 1
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                left[type(error).__name__] += 1

    async def stay() -> None:
        while not over.is_set():
            stayed.append(await stand.ask(server.target, stand.some(chosen)))

    over = asyncio.Event()
    staying = [asyncio.create_task(stay()) for _ in range(4)]
    await asyncio.gather(*(leave() for _ in range(concurrency)))
    over.set()
    await asyncio.gather(*staying)
    return {
        "left": dict(left),
        "stayed": stand.judged(stayed),
        "after": await leftovers(server, before),
    }


async def slow_readers(server: Server, stand: Stand, readers: int, pause: float) -> dict[str, Any]:
    """Clients that stop reading for a while, and others beside them, which must not wait for it."""
    before = await warm(server, stand)
    numbers = [number % len(stand.alone) for number in range(readers)]
    slow = asyncio.gather(*(stand.ask(server.target, n, pause=pause) for n in numbers))
    await asyncio.sleep(0.2)
    began = time.perf_counter()
    others = await asyncio.gather(*(stand.ask(server.target, n) for n in numbers[:4]))
    seconds = time.perf_counter() - began
    return {
        "slow": stand.judged(await slow),
        "others": {**stand.judged(others), "seconds": seconds, "pause": pause},
        "after": await leftovers(server, before),
    }


async def full_queue(server: Server, stand: Stand, requests: int) -> dict[str, Any]:
    """More at once than rows and queue hold; ``server`` has few of both."""
    before = await warm(server, stand, requests=1)
    numbers = [number % len(stand.alone) for number in range(requests)]
    replies = await asyncio.gather(*(stand.ask(server.target, n) for n in numbers))
    refused = [reply for reply in replies if reply.status == 429]
    return {
        **stand.judged(replies),
        "status_429": len(refused),
        "with_retry_after": sum(bool(reply.retry_after) for reply in refused),
        "after": await leftovers(server, before),
    }


# -- the system -----------------------------------------------------------------------------------


async def kill_engine(
    server: Server, stand: Stand, concurrency: int, seconds: float
) -> dict[str, Any]:
    """SIGKILL to the engine process, a third into a load."""
    before = await warm(server, stand)
    down = 0.0

    async def kill() -> None:
        nonlocal down
        await asyncio.sleep(seconds / 3)
        os.kill(server.worker(), signal.SIGKILL)
        began = time.perf_counter()
        await asyncio.sleep(0.5)
        while time.perf_counter() - began < _IDLE_SECONDS:
            with suppress(OSError):
                if (await get(server.target, "/ready"))[0] == 200:
                    break
            await asyncio.sleep(0.1)
        down = time.perf_counter() - began

    numbers = (number % len(stand.alone) for number in count())
    killing = asyncio.create_task(kill())
    load = await closed_loop(
        lambda number: stand.ask(server.target, number), numbers, concurrency, seconds, stand.limit
    )
    await killing
    again = await asyncio.gather(*(stand.ask(server.target, n) for n in range(len(stand.alone))))
    return {
        "load": {**stand.judged(load.replies), "without_end": load.cut},
        "ready_again_seconds": down,
        "restarts": (await metrics(server.target)).get("engine_restarts_total"),
        "then": stand.judged(again),
        "after": await leftovers(server, before),
    }


async def terminate(server: Server, stand: Stand, requests: int) -> dict[str, Any]:
    """SIGTERM while some run and some wait: those finish, later ones are told to go elsewhere."""
    await warm(server, stand, requests=2)
    numbers = [number % len(stand.alone) for number in range(requests)]
    taken = [asyncio.create_task(stand.ask(server.target, number)) for number in numbers]
    while not sum(task.done() for task in taken) and not await _one_runs(server):
        await asyncio.sleep(0.02)
    done = sum(task.done() for task in taken)
    os.kill(server.pid, signal.SIGTERM)
    began = time.perf_counter()
    await asyncio.sleep(0.3)
    late = await asyncio.gather(*(stand.ask(server.target, number) for number in numbers[:8]))
    replies = await asyncio.gather(*taken)
    code = await server.exit_code(stand.limit)
    return {
        "accepted": {**stand.judged(replies), "done_before_the_signal": done},
        "sent_later": stand.judged(late),
        "exit_code": code,
        "seconds_to_the_end": time.perf_counter() - began,
    }


async def _one_runs(server: Server) -> bool:
    return (await metrics(server.target)).get("num_requests_running", 0) > 0


# -- time -----------------------------------------------------------------------------------------


async def soak(server: Server, stand: Stand, concurrency: int, seconds: float) -> dict[str, Any]:
    """Mixed load: greedy answers, sampled ones, clients that leave, requests that are wrong."""
    before = await warm(server, stand)
    chosen, kinds = random.Random(1), Counter[str]()

    async def one(number: int) -> Reply:
        kind = chosen.choices(["greedy", "sampled", "left", "refused"], [70, 15, 10, 5])[0]
        kinds[kind] += 1
        if kind == "greedy":
            return await stand.ask(server.target, stand.some(chosen))
        skipped = Reply(-1, time.perf_counter(), error="")
        if kind == "left":
            with suppress(OSError, asyncio.IncompleteReadError):
                await abort_one(server.target, stand, chosen)
            return skipped
        fields = {"temperature": 9} if kind == "refused" else {"temperature": 1.0, "seed": number}
        reply = await stand.ask(server.target, stand.some(chosen), **fields)
        if kind == "refused" and reply.status == 400:
            return skipped
        return replace(reply, prompt=-1)

    with Scale(server.pid, 3.0) as scale:
        load = await closed_loop(one, count(), concurrency, seconds, stand.limit)
    greedy = [reply for reply in load.replies if reply.error or reply.prompt >= 0]
    half = [sample for sample in scale.samples if sample[0] > seconds / 2]
    return {
        "minutes": seconds / 60,
        "kinds": dict(kinds),
        "greedy": stand.judged(greedy),
        "without_end": load.cut,
        # behind the first half: caches and pools fill up before
        "server_mb_per_hour": slope([(at, top) for at, top, _ in half]) * 3600 / 1e6,
        "engine_mb_per_hour": slope([(at, below) for at, _, below in half]) * 3600 / 1e6,
        "server_mb_most": max(top for _, top, _ in scale.samples) / 1e6,
        "engine_mb_most": max(below for _, _, below in scale.samples) / 1e6,
        "samples": [[round(at, 1), top, below] for at, top, below in scale.samples],
        "after": await leftovers(server, before),
    }


async def run_faults(
    stand: Stand,
    names: Iterable[str],
    *,
    abort_requests: int,
    load_seconds: float,
    pause: float = 5.0,
) -> dict[str, Any]:
    """Cases by name, each with a server of its own."""
    cases: dict[str, tuple[tuple[str, ...], Callable[[Server], Awaitable[dict[str, Any]]]]] = {
        "aborts": ((), lambda s: aborts(s, stand, abort_requests, 32)),
        "slow readers": ((), lambda s: slow_readers(s, stand, 16, pause)),
        "engine killed": ((), lambda s: kill_engine(s, stand, 16, load_seconds)),
        "full queue": (
            ("--max-rows", "4", "--max-queue", "8"),
            lambda s: full_queue(s, stand, 64),
        ),
        "SIGTERM": (
            ("--max-rows", "8", "--drain-seconds", str(stand.limit)),
            lambda s: terminate(s, stand, 32),
        ),
    }
    found = {}
    for name in names:
        options, case = cases[name]
        kind = replace(stand.kind, options=(*stand.kind.options, *options))
        async with serving(kind, stand.log, stand.threads) as server:
            found[name] = await case(server)
        print(f"{name}: {found[name]}", flush=True)
    return found
