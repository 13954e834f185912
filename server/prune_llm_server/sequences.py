"""The sequences of one request, run together: one stream of (which sequence, what is new)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from prune_llm_server.engine import Answer, Engine, EngineRequest, Failed
from prune_llm_server.errors import ApiError
from prune_llm_server.metrics import Meter

# answers that wait for a client which reads slower than the engine draws
_AHEAD = 256

Step = tuple[int, Answer]


class Sequences:
    """Answers that are under way. Closing them cancels what is not finished."""

    def __init__(self, first: Step, steps: AsyncGenerator[Step, None], meter: Meter) -> None:
        self._first = first
        self._steps = steps
        self._meter = meter

    @classmethod
    async def begin(
        cls, engine: Engine, requests: Sequence[EngineRequest], meter: Meter
    ) -> Sequences:
        """Start all and wait for the first answer of any, so that a refusal gets its own status.

        Raises:
            ApiError: the engine does not take a request.
            EngineError: it is busy, gone or too slow.
        """
        steps = _run(engine, requests)
        return cls(await anext(steps), steps, meter)

    async def answers(self) -> AsyncGenerator[Step, None]:
        """Every step of every sequence, each sequence's in order."""
        async with aclosing(self._steps):
            self._meter.saw(*self._first)
            yield self._first
            async for step in self._steps:
                self._meter.saw(*step)
                yield step

    async def close(self) -> None:
        await self._steps.aclose()


def _run(engine: Engine, requests: Sequence[EngineRequest]) -> AsyncGenerator[Step, None]:
    if len(requests) > 1:
        return _interleaved(engine, requests)
    return _one(engine, 0, requests[0])  # the usual request pays for no task and no queue


async def _one(engine: Engine, index: int, request: EngineRequest) -> AsyncGenerator[Step, None]:
    stream = cast("AsyncGenerator[Answer, None]", engine.stream(request))
    finished = False
    async with aclosing(stream):
        try:
            async for answer in stream:
                finished = answer.finish_reason is not None
                yield index, answer
        except ValueError as error:
            raise ApiError(400, str(error)) from None
    if not finished:
        raise Failed("the engine ended an answer without a reason")


async def _interleaved(
    engine: Engine, requests: Sequence[EngineRequest]
) -> AsyncGenerator[Step, None]:
    queue: asyncio.Queue[Step | Exception | None] = asyncio.Queue(_AHEAD)

    async def pump(index: int, request: EngineRequest) -> None:
        try:
            async with aclosing(_one(engine, index, request)) as steps:
                async for step in steps:
                    await queue.put(step)
            await queue.put(None)
        except Exception as error:  # raised again where the queue is read
            await queue.put(error)

    tasks = [asyncio.create_task(pump(index, request)) for index, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
