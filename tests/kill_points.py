"""Runs that are killed at the k-th durable step, one after the other, each then resumed.

A script: it imports everything once, and each run is a fork of it, so that a kill costs no start.
It reads JSON requests on standard input, a line each, and prints what became of every run as JSON,
a line for each request.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# the calls of the operating system that change what is on disk
STEPS = ("fsync", "replace", "rename", "unlink", "write", "mkdir", "rmdir", "link")
# of the report: differ from run to run
UNSTABLE = {"seconds", "peak_memory", "predicted", "output"}


class Steps:
    """Counts the calls of `STEPS`; ``at`` is told of each before it is made."""

    def __init__(self, at: Callable[[int, str], None]) -> None:
        self.done = 0
        self._before = {name: getattr(os, name) for name in STEPS}
        for name, call in self._before.items():
            setattr(os, name, self._counted(name, call, at))

    def end(self) -> None:
        for name, call in self._before.items():
            setattr(os, name, call)

    def _counted(self, name: str, call: Any, at: Callable[[int, str], None]) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.done += 1
            at(self.done, name)
            return call(*args, **kwargs)

        return counted


def killing(last: int, which: signal.Signals) -> Callable[[int, str], None]:
    def at(step: int, _name: str) -> None:
        if step == last:
            os.kill(os.getpid(), which)

    return at


def filling(last: int) -> Callable[[int, str], None]:
    """From a step on the disk is full."""

    def at(step: int, name: str) -> None:
        if step >= last and name in ("write", "fsync", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return at


def run(request: dict[str, Any], output: Path, resume: bool) -> None:
    from prune_llm import PruneConfig, SparsifyConfig, prune, prune_within, saving

    saving.BESIDE = frozenset({"cpu"} if request.get("beside") else ())  # as on a GPU
    config = PruneConfig(**request["config"])
    levels = SparsifyConfig(**request["levels"]) if "levels" in request else None
    if "within" in request:
        prune_within(
            request["model"], request["within"], config, output, levels=levels, resume=resume
        )
    else:
        prune(request["model"], config, output, levels=levels, resume=resume)


def forked(work: Callable[[], None]) -> tuple[int, str]:
    """Exit status and the last line of what was raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status, write = 0, os.write  # not the counted one
        try:
            work()
        except BaseException as error:
            status = 3 if isinstance(error, (ValueError, OSError)) else 4
            text = "" if status == 3 else traceback.format_exc()
            write(writing, f"{text}{type(error).__name__}: {error}".encode()[:4000])
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        text = said.read().decode()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text


def content(directory: Path) -> dict[str, str]:
    """Hashes of all files by name; reports without what may differ."""
    found = {}
    for file in sorted(p for p in directory.rglob("*") if p.is_file()):
        data = file.read_bytes()
        if file.name.endswith("_report.json"):
            data = json.dumps(stable(json.loads(data)), sort_keys=True).encode()
        found[str(file.relative_to(directory))] = hashlib.sha256(data).hexdigest()
    return found


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in UNSTABLE}
    return [stable(v) for v in value] if isinstance(value, list) else value


def interrupted(request: dict[str, Any], place: Path, step: int, stop: str) -> dict[str, Any]:
    """A run that ends at a step, and one that goes on; what is there after each."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    output = place / "out"

    def stopped() -> None:
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.default_int_handler)
        Steps(filling(step) if stop == "full" else killing(step, signal.Signals[stop]))
        run(request, output, resume=False)

    status, said = forked(stopped)
    left = sorted(path.name for path in place.iterdir())
    blocks = (place / ".out.partial" / "journal.jsonl").is_file()
    again, why = (0, "") if output.exists() else forked(lambda: run(request, output, resume=True))
    return {
        "step": step,
        "stop": stop,
        "status": status,
        "said": said,
        "left": left,
        "journal": blocks,
        "resumed": again,
        "why": why,
        "content": content(output) if output.exists() else None,
        "rest": sorted(path.name for path in place.iterdir()),
    }


def counted(request: dict[str, Any], place: Path) -> tuple[int, dict[str, str]]:
    """Steps of a run that nothing stops, and what it writes.

    In this process, so that whatever is loaded when it is first needed is loaded before a fork.
    """
    place.mkdir()
    steps = Steps(lambda *_: None)
    run(request, place / "out", resume=False)
    steps.end()
    return steps.done, content(place / "out")


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Runs stopped at every ``stride``-th step, in all ways of ``stop`` in turn."""
    place = Path(request["place"])
    place.mkdir()
    steps, whole = counted(request, place / "whole")
    wanted = range(request.get("first", 1), steps + 1, request["stride"])
    stops = request["stop"]
    runs = [
        interrupted(request, place / "stopped", step, stops[number % len(stops)])
        for number, step in enumerate(wanted)
    ]
    return {"steps": steps, "whole": whole, "runs": runs}


def main() -> None:
    requests = [json.loads(line) for line in sys.stdin]
    torch.set_num_threads(1)
    for request in requests:
        print(json.dumps(answered(request)), flush=True)


if __name__ == "__main__":
    main()
