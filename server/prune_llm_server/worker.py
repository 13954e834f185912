"""The engine process: loads the model, batches sequences, tells the server what came of them.

Started by embedded.py with the number of an open socket. The first message is its configuration;
then sequences come and go. It ends when the server does, however that ends.

Messages to it: {"add": {...}}, {"cancel": id}. From it: {"loading": {}}, {"ready": {...}},
{"failed": text}, {"refused": [id, text]}, {"events": [...], "status": {...}}.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune_llm_server.wire import Message, messages, pack

if TYPE_CHECKING:
    from prune_llm.segments import BatchLimits, Runner
    from prune_llm.sequences import SequenceEvent, SequenceRequest

ALIVE_SECONDS = 1.0  # an idle engine says so this often
_WARM_TOKENS = 4
_CONTEXT = 4096  # of models that name none
_SHARE_OF_MEMORY = 0.25


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox), daemon=True).start()
    with suppress(ConnectionError):  # the server is gone: there is nobody to tell
        _work(connection, inbox)


def _work(connection: socket.socket, inbox: queue.SimpleQueue[Message]) -> None:
    config = inbox.get()
    connection.sendall(pack({"loading": {}}))
    try:
        worker = Worker(config, connection, inbox)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        connection.sendall(pack({"failed": " ".join(str(error).split()) or type(error).__name__}))
        sys.exit(1)
    worker.run()


def _end_with_parent() -> None:
    """Where the system can: killed with the server, even while it loads."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # sys/prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _receive(connection: socket.socket, inbox: queue.SimpleQueue[Message]) -> None:
    with suppress(ConnectionError):  # it ended with something unread
        for message in messages(connection):
            inbox.put(message)
    os._exit(0)


class Worker:
    """One model and its batcher."""

    def __init__(
        self, config: Message, connection: socket.socket, inbox: queue.SimpleQueue[Message]
    ) -> None:
        import torch
        from transformers.utils import logging

        import prune_llm
        from prune_llm.admission import admit, one_line
        from prune_llm.batching import Batcher
        from prune_llm.generation import end_ids, load_tokenizer
        from prune_llm.runners import new_runner
        from prune_llm.sampling import SamplingParams, model_defaults

        if config["threads"] is not None:
            torch.set_num_threads(config["threads"])
        self._connection, self._inbox = connection, inbox
        self._timers: dict[str, Timer] = {}
        logging.disable_progress_bar()  # the server's log is lines of JSON
        trust = config["trust_remote_code"]
        directory = admit(config["model"], trust)
        with one_line(directory):
            model = prune_llm.load(
                directory,
                device=config["device"],
                trust_remote_code=trust,
                use_safetensors=True,
            )
            tokenizer = load_tokenizer(model, trust)
            sampling, ends = model_defaults(model.generation_config), end_ids(model)
            SamplingParams(**sampling)  # refuses what no request could be answered with
            runner = new_runner(model, _limits(config, model))
        if config["default_level"] not in runner.levels:
            known = ", ".join(runner.levels)
            raise ValueError(
                f"default_level {config['default_level']!r}: does not exist; this model has {known}"
            )
        _warm_up(runner)
        self._batcher = Batcher(runner, ends)
        holds = runner.pages * runner.limits.page_size
        info = {
            "directory": str(model.config.name_or_path),
            "created": int((Path(model.config.name_or_path) / "config.json").stat().st_mtime),
            "context": min(runner.context, holds),
            "vocabulary": min(runner.vocabulary, len(tokenizer)),
            "levels": list(runner.levels),
            "sampling": sampling,
            "details": {
                "engine": runner.name,
                "device": str(model.device),
                "dtype": str(model.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "max_rows": runner.limits.max_rows,
                "chunk_tokens": runner.limits.chunk_tokens,
                "cache_bytes": runner.limits.cache_bytes,
                "cache_tokens": holds,
                "page_size": runner.limits.page_size,
                **({"ways": list(runner.ways)} if runner.ways else {}),
            },
        }
        self._send({"ready": info, "status": self._status()})

    def run(self) -> None:
        """Step after step, for ever."""
        while True:
            self._take()
            began = time.monotonic()
            events = self._batcher.step()
            for id in self._batcher.joined:
                self._timers[id].joined = began
            told = [{**_lean(event), **self._times(event)} for event in events]
            self._send({"events": told, "status": self._status()})

    def _times(self, event: SequenceEvent) -> Message:
        """What its first event says of the time it took."""
        timer = self._timers.pop(event.id, None)
        return {} if timer is None else timer.times()

    def _take(self) -> None:
        """What came since the last step; waits while there is nothing to run."""
        while True:
            try:
                wait = self._batcher.idle
                message = self._inbox.get(block=wait, timeout=ALIVE_SECONDS if wait else None)
            except queue.Empty:
                if not self._batcher.idle:
                    return
                self._send({"events": [], "status": self._status()})
                continue
            self._handle(message)

    def _handle(self, message: Message) -> None:
        if "cancel" in message:
            self._batcher.cancel(message["cancel"])
            self._timers.pop(message["cancel"], None)
            return
        fields = message["add"]
        try:
            self._batcher.add(_request(fields))
            self._timers[fields["id"]] = Timer()
        except ValueError as error:
            self._send({"refused": [fields["id"], str(error)]})

    def _status(self) -> Message:
        return asdict(self._batcher.status)

    def _send(self, message: Message) -> None:
        self._connection.sendall(pack(message))


class Timer:
    """When a sequence came and first ran."""

    def __init__(self) -> None:
        self._came = self.joined = time.monotonic()

    def times(self) -> Message:
        """Of a sequence whose prompt was finished just now."""
        now = time.monotonic()
        return {"queue_seconds": self.joined - self._came, "prefill_seconds": now - self.joined}


def _limits(config: Message, model: Any) -> BatchLimits:
    from prune_llm.runners import token_bytes
    from prune_llm.segments import BatchLimits

    limits = BatchLimits(
        max_rows=config["max_rows"], chunk_tokens=config["chunk_tokens"], levels=config["levels"]
    )
    cache_bytes = config["cache_bytes"]
    if cache_bytes is None:
        cache_bytes = _affordable(token_bytes(model), model, limits)
    return replace(limits, cache_bytes=cache_bytes)


def _affordable(token_bytes: int, model: Any, limits: BatchLimits) -> int:
    """For every sequence at the model's full context, but no more than there is to spare."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or _CONTEXT
    spare = int(_free_memory(model.device) * _SHARE_OF_MEMORY)
    # a page more for each: the last is seldom full
    return min(spare, limits.max_rows * (context + limits.page_size) * token_bytes)


def _free_memory(device: Any) -> int:
    """Bytes that the GPU still has; of a CPU the system, or the container where that has less."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container sees its own as the root of version 2
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def _warm_up(runner: Runner) -> None:
    """Touch every weight and buffer: the first request should find what later ones find."""
    from prune_llm.activation.levels import DENSE
    from prune_llm.batching import Batcher
    from prune_llm.sampling import SamplingParams
    from prune_llm.sequences import SequenceRequest

    batcher = Batcher(runner)
    # on a GPU every number of rows is compiled and recorded when it first comes
    for levels in (runner.levels, *((DENSE,) * rows for rows in runner.warm_rows)):
        for place, level in enumerate(levels):
            params = SamplingParams(max_tokens=_WARM_TOKENS, temperature=0, ignore_eos=True)
            batcher.add(SequenceRequest(str(place), (0,), params, level))
        while not batcher.idle:
            batcher.step()


def _request(fields: Message) -> SequenceRequest:
    from prune_llm.sampling import SamplingParams
    from prune_llm.sequences import SequenceRequest

    params = fields["params"]
    bias = {int(token): value for token, value in params["logit_bias"].items()}
    return SequenceRequest(
        **{
            **fields,
            "ids": tuple(fields["ids"]),
            "params": SamplingParams(**{**params, "logit_bias": bias, "stop": ()}),
        }
    )


def _lean(event: SequenceEvent) -> Message:
    """Without what is empty: a step has an event of each running sequence."""
    lean: Message = {"id": event.id, "token": event.token}
    if event.score is not None:
        lean["score"] = asdict(event.score)
    if event.prompt:
        lean["prompt"] = [asdict(score) for score in event.prompt]
    for name in ("finish_reason", "cached_tokens", "active", "error"):
        if value := getattr(event, name):
            lean[name] = value
    return lean


if __name__ == "__main__":
    main()
