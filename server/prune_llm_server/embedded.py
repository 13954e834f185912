"""The engine that comes with the server: a process of its own, which this one feeds and watches.

Text stays here: prompts become tokens and tokens become text in the server, so that the engine
process only ever computes. If that dies, what it was doing fails, and another takes its place.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from prune_llm.generation import AnswerText
from prune_llm.vocabulary import Vocabulary
from prune_llm_server.encoding import Encoder
from prune_llm_server.engine import (
    Answer,
    Busy,
    Candidate,
    EngineError,
    EngineInfo,
    EngineRequest,
    EngineStatus,
    Failed,
    TimeLimit,
    TokenReport,
    Unavailable,
)
from prune_llm_server.errors import LOGGER
from prune_llm_server.process import EngineProcess, ended_if_unused
from prune_llm_server.wire import Message

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's documentation names this value
_CHECK_SECONDS = 1.0
_RESTART_WINDOW = 600.0


@dataclass(frozen=True)
class EngineConfig:
    """What is served, and with how much of the machine.

    Attributes:
        model: directory or hub name. served_name: what clients call it.
        max_rows: sequences decoded at once; max_queue: sequences that may wait beside them.
        chunk_tokens: prompt tokens computed in a step, beside one token of each sequence.
        cache_bytes: for keys and values; None: see `worker._affordable`.
        levels: serve the checkpoint's levels of activation sparsity; default_level: for requests
            that name none.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        threads: None: torch's choice.
        trust_remote_code: run code that comes with the model.
        load_seconds: for loading the model and its first tokens; what takes longer is ended.
        stuck_seconds: without a word from the engine it counts as stuck; after twice as long it is
            killed. Its longest step must be shorter.
        max_restarts: in ten minutes; one more and the engine is dead for good.
    """

    model: str
    served_name: str
    max_rows: int = 32
    max_queue: int = 256
    chunk_tokens: int = 128
    cache_bytes: int | None = None
    levels: bool = True
    default_level: str = "dense"
    device: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False
    load_seconds: float = 1800.0
    stuck_seconds: float = 60.0
    max_restarts: int = 3


class EmbeddedEngine:
    """See `Engine`. ``on_dead`` is called with an exit code when no restart will be tried."""

    def __init__(self, config: EngineConfig, on_dead: Callable[[int], None]) -> None:
        self._config, self._on_dead = config, on_dead
        self._info: EngineInfo | None = None
        self._process: EngineProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._answers: dict[str, asyncio.Queue[Message | EngineError]] = {}
        self._status: Message = {}
        self._restarts: list[float] = []
        self._seconds = 1.0  # of a request, of late
        self._reason, self._dead = "the model is loading", False
        self._encoder = Encoder()
        self._vocabulary: Vocabulary | None = None

    # -- its life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        process = await EngineProcess.start(self._config)
        async with ended_if_unused(process):
            ready = await process.until_ready(self._config.load_seconds)
            await self._encoder.load(ready["directory"], self._config.trust_remote_code)
            self._vocabulary = Vocabulary(self._encoder.tokenizer)
        self._serve_with(process, ready)
        self._keeper = asyncio.create_task(self._keep())

    def _serve_with(self, process: EngineProcess, ready: Message) -> None:
        self._process, self._status = process, process.last_status
        self._info = EngineInfo(
            model=self._config.served_name,
            created=ready["created"],
            context=ready["context"],
            vocabulary=ready["vocabulary"],
            levels=tuple(ready["levels"]),
            default_level=self._config.default_level,
            chat=bool(getattr(self._encoder.tokenizer, "chat_template", None)),
            sampling={"temperature": 1.0, **ready["sampling"]},  # 1 is what OpenAI's API documents
            details=ready["details"],
        )

    async def _keep(self) -> None:
        """Deliver what the engine says; replace it when it dies."""
        while self._process is not None:
            process = self._process
            watch = asyncio.create_task(self._watch(process))
            try:
                while (message := await process.read()) is not None:
                    self._deliver(message)
            finally:
                watch.cancel()
            why = await process.end()
            self._process, self._status = None, {}
            self._fail_all(f"the engine {why} while the request was running; send it again")
            LOGGER.error("engine died", extra={"fields": {"reason": why}})
            await self._replace(why)

    async def _replace(self, why: str) -> None:
        now = time.monotonic()
        recent = [at for at in self._restarts if at > now - _RESTART_WINDOW]
        if len(recent) >= self._config.max_restarts:
            self._give_up(f"the engine {why}, and was restarted {len(recent)} times before")
            return
        self._restarts.append(now)
        self._reason = f"the engine {why} and is being restarted"
        try:
            process = await EngineProcess.start(self._config)
            async with ended_if_unused(process):
                ready = await process.until_ready(self._config.load_seconds)
            self._serve_with(process, ready)
        except (EngineError, ValueError) as error:
            self._give_up(f"the engine {why} and could not be restarted: {error}")
        else:
            LOGGER.info("engine restarted", extra={"fields": {"restarts": len(self._restarts)}})

    def _give_up(self, why: str) -> None:
        self._reason, self._dead = why, True
        LOGGER.error("engine dead", extra={"fields": {"reason": why}})
        self._on_dead(1)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill an engine that says nothing for too long; the loop above then replaces it."""
        checks = 0
        while checks < 2:  # where this process itself was held up, the first check comes too early
            await asyncio.sleep(_CHECK_SECONDS)
            checks = checks + 1 if process.silence >= 2 * self._config.stuck_seconds else 0
        LOGGER.error("engine stuck", extra={"fields": {"silent_seconds": process.silence}})
        process.kill()

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self._process is not None:
            self._process.kill()
            await self._process.end()
            self._process = None
        self._reason = "the engine was stopped"
        self._fail_all(self._reason)
        self._encoder.close()

    def _fail_all(self, why: str) -> None:
        for answers in self._answers.values():
            answers.put_nowait(Failed(why))

    # -- what the application asks -------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise Unavailable(self._reason)
        return self._info

    def status(self) -> EngineStatus:
        process, known = self._process, self._status
        silent = 0.0 if process is None else process.silence
        stuck = silent >= self._config.stuck_seconds
        reason = "" if process is not None else self._reason
        if stuck:
            reason = f"the engine has said nothing for {silent:.0f} seconds"
        held, pages = known.get("pages_held", 0), known.get("pages", 0)
        return EngineStatus(
            ready=process is not None and not stuck,
            healthy=not stuck and not self._dead,
            reason=reason,
            waiting=known.get("waiting", 0),
            running=known.get("running", 0),
            cache_used=held / pages if pages else 0.0,
            restarts=len(self._restarts),
            preemptions=known.get("preemptions", 0),
            cached_tokens=known.get("cached_tokens", 0),
            prompt_tokens=known.get("prompt_tokens", 0),
        )

    async def encode(self, prompt: str) -> tuple[int, ...]:
        return await self._encoder.encode(prompt)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return await self._encoder.encode(list(messages))

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Answer, None]:
        answers = self._submit(request)
        began, limit = time.monotonic(), request.seconds
        writer = _Writer(request, self._encoder.tokenizer, self._vocabulary)
        try:
            while not writer.finished:
                left = None if limit is None else began + limit - time.monotonic()
                try:
                    # not wait_for, which in Python 3.11 may swallow the cancellation of a request
                    async with asyncio.timeout(left):
                        events = await _next(answers)
                except TimeoutError:
                    raise TimeLimit(f"the request took longer than {limit:g} seconds") from None
                yield writer.answer(events)
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)
        finally:
            del self._answers[request.id]
            if not writer.ended and self._process is not None:
                self._process.send({"cancel": request.id})

    def _submit(self, request: EngineRequest) -> asyncio.Queue[Message | EngineError]:
        if self._process is None:
            raise Unavailable(self._reason)
        room = self._config.max_rows + self._config.max_queue
        if len(self._answers) >= room:
            rounds = 1 + self._config.max_queue / self._config.max_rows / 2
            raise Busy(
                f"{room} requests are running or waiting, as many as this server takes",
                retry_after=max(1, math.ceil(self._seconds * rounds)),
            )
        assert request.id not in self._answers
        answers = self._answers[request.id] = asyncio.Queue()
        fields = asdict(request)
        del fields["seconds"], fields["params"]["stop"]
        self._process.send({"add": fields})
        return answers

    def _deliver(self, message: Message) -> None:
        self._status = message.get("status", self._status)
        for event in message.get("events", ()):
            answers = self._answers.get(event["id"])
            if answers is not None:  # else cancelled a moment ago
                answers.put_nowait(event)
        if "refused" in message:
            id, why = message["refused"]
            if id in self._answers:
                self._answers[id].put_nowait({"refused": why})


async def _next(answers: asyncio.Queue[Message | EngineError]) -> list[Message]:
    """The events that came, at least one.

    Raises:
        Failed, ValueError: no answer will come.
    """
    found = [await answers.get()]
    while not answers.empty():
        found.append(answers.get_nowait())
    events = []
    for event in found:
        if isinstance(event, EngineError):
            raise event
        if "refused" in event:
            raise ValueError(event["refused"])
        if "error" in event:
            raise Failed(event["error"])
        events.append(event)
    return events


class _Writer:
    """Makes answers of the engine's events of one request.

    Attributes:
        finished: the answer is whole. ended: the engine is done with it.
    """

    def __init__(self, request: EngineRequest, tokenizer: Any, vocabulary: Any) -> None:
        self._scored = request.logprobs is not None
        self._vocabulary: Vocabulary = vocabulary
        self._text = AnswerText(tokenizer, request.ids, request.params.stop)
        self.finished = self.ended = False

    def answer(self, events: Sequence[Message]) -> Answer:
        """Of one event or several, up to where the answer ends."""
        drawn, reason = 0, None
        reports: list[TokenReport] = []
        for event in events:
            reason = event.get("finish_reason")
            self.ended = reason is not None
            if event["token"] is not None:
                drawn += 1
                reason = self._text.add(event["token"], reason)
                if self._scored:
                    reports.append(self._report(event["score"]))
            if reason is not None:
                break
        self.finished = reason is not None
        return Answer(
            text=self._text.take(),
            tokens=drawn,
            reports=tuple(reports),
            prompt=tuple(self._report(score) for score in events[0].get("prompt", ())),
            finish_reason=reason,
            cached_tokens=events[0].get("cached_tokens", 0),
            active=events[-1].get("active"),
            queue_seconds=events[0].get("queue_seconds"),
            prefill_seconds=events[0].get("prefill_seconds"),
        )

    def _report(self, score: Message) -> TokenReport:
        text, raw = self._vocabulary.spell(score["id"])
        top = []
        for id, logprob in score.get("top", ()):
            spelled = self._vocabulary.spell(id)
            top.append(Candidate(id, *spelled, max(logprob, _LEAST_LOGPROB)))
        logprob = score["logprob"]
        least = None if logprob is None else max(logprob, _LEAST_LOGPROB)
        return TokenReport(score["id"], text, raw, least, tuple(top))
