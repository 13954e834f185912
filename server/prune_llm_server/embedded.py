"""The engine that comes with the server: a process of its own, which this one feeds and watches.

Text stays here: prompts become tokens and tokens become text in the server, so that the engine
process only ever computes. If that dies, what it was doing fails, and another takes its place.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prune_llm.generation import AnswerText, prompt_ids
from prune_llm.vocabulary import Vocabulary
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
from prune_llm_server.security import KEYS_VARIABLE
from prune_llm_server.wire import Message, pack, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's documentation names this value
_CHECK_SECONDS = 1.0
_CLOSING_SECONDS = 3.0
_RESTART_WINDOW = 600.0


@dataclass(frozen=True)
class EngineConfig:
    """What is served, and with how much of the machine.

    Attributes:
        model: directory or hub name. served_name: what clients call it.
        max_rows: sequences decoded at once; max_queue: sequences that may wait beside them.
        chunk_tokens: prompt tokens computed in a step, beside one token of each sequence.
        cache_bytes: for keys and values; None: see `prune_llm.runners.default_cache_bytes`.
        levels: serve the checkpoint's levels of activation sparsity; default_level: for requests
            that name none.
        threads: None: torch's choice.
        trust_remote_code: run code that comes with the model.
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
    threads: int | None = None
    trust_remote_code: bool = False
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
        # one thread: a tokenizer is not made for several at once
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._vocabulary: Vocabulary | None = None

    # -- its life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        process = await EngineProcess.start(self._config)
        async with _ended_if_unused(process):
            ready = await process.until_ready()
            await asyncio.get_running_loop().run_in_executor(self._encoder, self._load_texts, ready)
        self._serve_with(process, ready)
        self._keeper = asyncio.create_task(self._keep())

    def _load_texts(self, ready: Message) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            ready["directory"], trust_remote_code=self._config.trust_remote_code
        )
        self._vocabulary = Vocabulary(self._tokenizer)

    def _serve_with(self, process: EngineProcess, ready: Message) -> None:
        self._process, self._status = process, process.last_status
        self._info = EngineInfo(
            model=self._config.served_name,
            created=ready["created"],
            context=ready["context"],
            vocabulary=ready["vocabulary"],
            levels=tuple(ready["levels"]),
            default_level=self._config.default_level,
            chat=bool(getattr(self._tokenizer, "chat_template", None)),
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
            async with _ended_if_unused(process):
                ready = await process.until_ready()
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
        self._encoder.shutdown(wait=False, cancel_futures=True)

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
        return await self._encode(prompt)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return await self._encode(list(messages))

    async def _encode(self, prompt: Any) -> tuple[int, ...]:
        loop = asyncio.get_running_loop()
        try:
            ids = await loop.run_in_executor(self._encoder, prompt_ids, prompt, self._tokenizer)
        except ValueError:
            raise
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(f"messages: the model's chat template refuses them: {error}") from None
        return tuple(ids)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[Answer, None]:
        answers = self._submit(request)
        began, limit = time.monotonic(), request.seconds
        writer = _Writer(request, self._tokenizer, self._vocabulary)
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


@asynccontextmanager
async def _ended_if_unused(process: EngineProcess) -> AsyncGenerator[None, None]:
    """End a process again that does not get ready, or that nobody waits for any more."""
    try:
        yield
    except BaseException:
        process.kill()
        await process.end()
        raise


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


class EngineProcess:
    """A running worker.py and the two ends of the talk with it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._heard = time.monotonic()
        self.last_status: Message = {}

    @staticmethod
    async def start(config: EngineConfig) -> EngineProcess:
        mine, theirs = socket.socketpair()
        with theirs:
            environment = {k: v for k, v in os.environ.items() if k != KEYS_VARIABLE}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "prune_llm_server.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # a Ctrl-C in the terminal is for the server
            )
        reader, writer = await asyncio.open_connection(sock=mine)
        found = EngineProcess(process, reader, writer)
        found.send(asdict(config))
        return found

    async def until_ready(self) -> Message:
        """What it says of the model.

        Raises:
            ValueError: it cannot be loaded as it is. EngineError: the engine died over it.
        """
        while (message := await self.read()) is not None:
            if "ready" in message:
                self.last_status = message["status"]
                ready: Message = message["ready"]
                return ready
            if "failed" in message:
                await self.end()
                raise ValueError(message["failed"])
        raise EngineError(f"the engine {await self.end()} while it loaded the model")

    @property
    def silence(self) -> float:
        """Seconds since its last word."""
        return time.monotonic() - self._heard

    async def read(self) -> Message | None:
        message = await read(self._reader)
        self._heard = time.monotonic()
        return message

    def send(self, message: Message) -> None:
        self._writer.write(pack(message))

    def kill(self) -> None:
        if self._process.returncode is None:
            # not by the process object, which may take the exit code from the one that waits for it
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    async def end(self) -> str:
        """Wait for its end, which a closed connection brings; how it ended."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()
        try:
            code = await asyncio.wait_for(self._process.wait(), _CLOSING_SECONDS)
        except TimeoutError:
            self.kill()
            code = await self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
