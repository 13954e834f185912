"""Servers as processes of their own: started, waited for, weighed, ended."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_client import Target, get

_ENGINE = "prune_llm_server.worker"
_READY_SECONDS = 300.0
_END_SECONDS = 60.0
_PEER_END_SECONDS = 2.0  # its batching thread keeps the process alive behind a SIGTERM
# `python -m` finds no such module in transformers; this is what its console script runs
_TRANSFORMERS = "from transformers.cli.transformers import main; main()"


@dataclass(frozen=True)
class Kind:
    """A way to serve a directory.

    Attributes:
        name: in tables. directory: what is served. options: of the command.
    """

    name: str
    directory: Path
    options: tuple[str, ...] = ()
    peer: bool = False

    def command(self, port: int) -> list[str]:
        address = ["--host", "127.0.0.1", "--port", str(port)]
        if self.peer:
            start = [sys.executable, "-c", _TRANSFORMERS, "serve", str(self.directory)]
            return [*start, *address, "--device", "cpu", *self.options]
        start = [sys.executable, "-m", "prune_llm", "serve", str(self.directory)]
        return [*start, *address, "--served-model-name", "model", *self.options]

    @property
    def model(self) -> str:
        return str(self.directory) if self.peer else "model"


def process_tree(pid: int) -> list[Any]:
    """The process and all below it, as psutil's; those that are there."""
    psutil = importlib.import_module("psutil")
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(process: Any) -> tuple[int, int]:
    """Resident bytes of a process, and its share of them where pages are shared (else the same)."""
    try:
        full = process.memory_full_info()
        return full.rss, getattr(full, "pss", full.rss)
    except importlib.import_module("psutil").Error:
        return 0, 0


@dataclass
class Scale:
    """Weighs a server's processes in a thread, every ``seconds``.

    Attributes:
        rss, pss: largest sums over its processes, in bytes.
        samples: (seconds since the beginning, resident bytes of the server, of what it started).
    """

    pid: int
    seconds: float = 1.0
    rss: int = 0
    pss: int = 0
    samples: list[tuple[float, int, int]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Scale:
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while True:
            found = [memory(process) for process in process_tree(self.pid)]
            if found:
                self.rss = max(self.rss, sum(rss for rss, _ in found))
                self.pss = max(self.pss, sum(pss for _, pss in found))
                below = sum(rss for rss, _ in found[1:])
                self.samples.append((time.monotonic() - self._began, found[0][0], below))
            if self._over.wait(self.seconds):
                return


@dataclass
class Server:
    """One that runs. ``ready_seconds``: from its start to its first good answer."""

    target: Target
    process: subprocess.Popen[bytes]
    ready_seconds: float

    @property
    def pid(self) -> int:
        return self.process.pid

    def worker(self) -> int:
        """The engine process."""
        (found,) = (p for p in process_tree(self.pid)[1:] if _ENGINE in p.cmdline())
        return int(found.pid)

    def descriptors(self) -> int:
        return int(process_tree(self.pid)[0].num_fds())

    async def exit_code(self, seconds: float) -> int | None:
        """When it ends; None: it does not."""
        due = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < due:
            await asyncio.sleep(0.05)
        return self.process.poll()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@asynccontextmanager
async def serving(kind: Kind, log: Path, threads: int | None = None) -> AsyncIterator[Server]:
    """Start a server, wait until it is ready; at the end it and all it started is gone."""
    port = free_port()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            kind.command(port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for the benchmark, which ends it in order
        )
    server = Server(Target(port, kind.model, kind.peer), process, 0.0)
    try:
        await until_ready(server, kind, log)
        server.ready_seconds = time.monotonic() - began
        yield server
    finally:
        end(process, _PEER_END_SECONDS if kind.peer else _END_SECONDS)


async def until_ready(server: Server, kind: Kind, log: Path) -> None:
    due = time.monotonic() + _READY_SECONDS
    while time.monotonic() < due:
        if server.process.poll() is not None:
            break
        with suppress(OSError, ValueError):
            if (await get(server.target, "/health" if kind.peer else "/ready"))[0] == 200:
                return
        await asyncio.sleep(0.1)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{kind.name} is not ready; the end of its log, {log}:\n{tail}")


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """SIGTERM, so many seconds, SIGKILL for whatever is left of it."""
    tree = process_tree(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    for each in tree:
        with suppress(importlib.import_module("psutil").NoSuchProcess):
            each.kill()  # psutil refuses if the number belongs to another process by now
    process.wait()


async def metrics(target: Target) -> dict[str, float]:
    """/metrics by name, without our prefix and labels; of several the sum."""
    found: dict[str, float] = {}
    for line in (await get(target, "/metrics"))[1].splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            short = name.partition("{")[0].removeprefix("prune_llm:")
            found[short] = found.get(short, 0.0) + float(value)
    return found


async def until_idle(target: Target, seconds: float) -> dict[str, float]:
    """The metrics when nothing runs or waits any more, or as they are when the time is over."""
    due = time.monotonic() + seconds
    while True:
        found = await metrics(target)
        busy = found.get("num_requests_running", 1) or found.get("num_requests_waiting", 1)
        if not busy or time.monotonic() > due:
            return found
        await asyncio.sleep(0.2)


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Of the straight line that fits best, per second."""
    count = len(samples)
    if count < 2:
        return 0.0
    mean_x = sum(x for x, _ in samples) / count
    mean_y = sum(y for _, y in samples) / count
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread
