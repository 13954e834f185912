"""The finished blocks of a run, committed to disk so that a stopped run goes on with the next one.

A commit is the block's weights, the streams behind the block, and a record of all that the blocks
behind depend on or the report tells. It is written by a thread while the next block is worked on:
files first, then the record, then what the streams replace is removed. What no record names does
not count.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prune_llm.checkpoint import read_header
from prune_llm.config import PruneConfig
from prune_llm.durability import check_file, described, sync_directory, sync_file
from prune_llm.footprint import Footprint, check_fits, footprint
from prune_llm.journal import JOURNAL_FILE, Journal, Record, check_settings
from prune_llm.masks import Pattern
from prune_llm.plan import Plan, make_plan
from prune_llm.reconstruction import BlockReconstruction
from prune_llm.report import LinearResult, environment, highest, peak_memory
from prune_llm.sparse_writer import Part
from prune_llm.staging import Staging
from prune_llm.stream_files import Store, StreamFile, Writer
from prune_llm.windows import surveys

if TYPE_CHECKING:
    from prune_llm.blocks import Walk
    from prune_llm.job import Job

# options that the results do not depend on
UNREAD = ("activations", "experts")
# weights of a block that may wait to be packed: all
MOST_WEIGHTS = 1 << 30
# how long the thread waits for the model's hash at a time
PAUSE = 0.1


class _Stopped(Exception):
    """The run ends before the model's hash is known."""


@dataclass(frozen=True)
class _Told:
    """How many entries of the job are in records already."""

    linears: int = 0
    reconstruction: int = 0
    warnings: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, job: Job) -> _Told:
        pairs = len(job.partly_paired)
        return cls(len(job.linears), len(job.reconstruction), len(job.warnings), pairs)


class Commits:
    """What a run keeps in ``directory`` while it works; use as a context.

    Args:
        staging: of the output; None: parts and streams lie here, and nothing is committed.
        settings: what the results depend on beside the job's, by group.
        tell: told what the run needs, before the work.
        whole: the pruned model is loaded whole behind the run.
    """

    def __init__(
        self,
        directory: Path,
        staging: Staging | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        tell: Callable[[str], None] = lambda _: None,
        whole: bool = False,
    ) -> None:
        self.directory, self._staging, self._more = directory, staging, settings or {}
        directory.mkdir(parents=True, exist_ok=True)
        self.journal = None if staging is None else Journal(directory)
        self.writer = Writer()
        self.packer = Writer(most=MOST_WEIGHTS)
        self._tell, self._whole = tell, whole
        self._started, self._stopping = time.perf_counter(), False
        self._unwritten: list[Record] = []
        self._told = _Told()

    def __enter__(self) -> Commits:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._stopping = True
        self.packer.stop()
        self.writer.stop()
        if self.journal is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            if self._staging is not None and self._staging.taken:
                self.journal = Journal(self.directory)  # what is on disk counts
                self._clear()
            raise OSError(f"{self.directory.parent}: the disk is full; make room") from error

    @property
    def blocks(self) -> list[Record]:
        """The records of finished blocks."""
        return [] if self.journal is None else self.journal.of_kind("block")

    @property
    def seconds_before(self) -> float:
        """Spent by the runs before this one, up to their last commit."""
        return 0.0 if self.journal is None else _latest(self.journal.records, "seconds", 0.0)

    # -- going on -----------------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        """Take up what a stopped run has finished.

        Raises:
            CannotResume: it was begun with other settings, or its files are damaged.
        """
        if self.journal is None:
            return
        settings = self._settings(job)
        if self.journal.records:
            settings["inputs"]["the model"] = job.hashing.result()
            check_settings(f"{self.directory}", self.journal.records[0], settings)
        else:
            blocks = len(job.architecture.blocks)
            self._unwritten.append({"kind": "settings", "blocks": blocks, **settings})
        self._hashing = job.hashing
        self._base_seconds = self.seconds_before
        self._clear()
        assert self._staging is not None
        self._staging.taken = True
        self._told = _Told.of(job)

    def _settings(self, job: Job) -> dict[str, dict[str, Any]]:
        calibration = None if job.calibration is None else job.calibration.sha256
        found: dict[str, dict[str, Any]] = {
            "options": without_unread(job.config),
            "inputs": {"the model": None, "the calibration text": calibration},
            "environment": environment(job.device, job.dtype),
        }
        return {group: {**own, **self._more.get(group, {})} for group, own in found.items()}

    def _clear(self) -> None:
        """Remove what no record names."""
        kept = {JOURNAL_FILE}
        for record in self.blocks:
            kept |= {record["part"]["file"]} if record["part"] else set()
        for record in self.blocks[-1:]:
            kept |= {entry["file"] for entry in record["streams"].values()}
        for path in self.directory.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def restore(self, job: Job, walk: Walk) -> None:
        """Put what the records tell into the job, and begin the walk behind the last block."""
        for record in self.blocks:
            _restore_block(job, record, self.directory)
        self._told = _Told.of(job)
        for record in self.blocks[-1:]:
            job.done = record["done"]
            files = {
                name: StreamFile.reopened(self.directory, entry)
                for name, entry in record["streams"].items()
            }
            walk.resume(record["index"] + 1, record["decided"], files)

    def foresee(self, job: Job) -> Footprint:
        """Tell what the run needs. Raises ValueError where that cannot fit."""
        found = footprint(job, self._whole)
        used = sum(file.stat().st_size for file in self.directory.iterdir() if file.is_file())
        check_fits(found, self.directory, used)
        self._tell(found.text)
        return found

    def store(self, on_disk: bool) -> Store:
        """Where the streams lie."""
        return Store(self.directory, on_disk, self.journal is not None, self.writer)

    # -- committing ---------------------------------------------------------------------------

    def plan(self, job: Job) -> Plan:
        """What a stopped run had planned; else made now, and kept where it took a walk."""
        records = [] if self.journal is None else self.journal.of_kind("plan")
        if records:
            patterns = {n: Pattern.parse(text) for n, text in records[0]["patterns"].items()}
            return Plan(patterns, records[0]["record"])
        plan = make_plan(job)
        texts = {name: str(pattern) for name, pattern in plan.patterns.items()}
        self._unwritten.append({"kind": "plan", "patterns": texts, "record": plan.record})
        if surveys(job.config) and self.journal is not None:
            self.writer.submit(self._write_first)
        return plan

    def commit(self, job: Job, walk: Walk, index: int, part: Future[Part] | None) -> None:
        """Hand a finished block to the thread; a commit before it that failed is raised here.

        Args:
            part: the block's weights, which may be on their way to disk still.
        """
        if self.journal is None:
            return
        told = self._told
        record = {
            "kind": "block",
            "index": index,
            "seconds": self._base_seconds + time.perf_counter() - self._started,
            "peak_memory": peak_memory(job.device),
            "done": job.done,
            "linears": [asdict(result) for result in job.linears[told.linears :]],
            "reconstruction": [asdict(r) for r in job.reconstruction[told.reconstruction :]],
            "warnings": job.warnings[told.warnings :],
            "partly_paired": job.partly_paired[told.pairs :],
            "decided": walk.decided(),
        }
        self._told = _Told.of(job)
        files = {name: s.file for name, s in walk.streams.items() if s.file is not None}
        replaced, walk.store.replaced = walk.store.replaced, []
        self.writer.submit(self._write, record, part, files, replaced)

    def finish(self) -> None:
        """All weights and commits are on disk when this returns."""
        self.packer.drain()
        self.writer.drain()

    def _write(
        self,
        record: Record,
        saved: Future[Part] | None,
        files: dict[str, StreamFile],
        replaced: list[StreamFile],
    ) -> None:
        """In the thread."""
        assert self.journal is not None
        for file in files.values():
            file.sync()
        record["streams"] = {name: file.described() for name, file in files.items()}
        record["part"] = None
        if saved is not None:
            part = saved.result()
            sync_file(part.file)
            record["part"] = {**described(part.file), "packed": part.packed}
        sync_directory(self.directory)
        self._write_first()
        self.journal.append(record)
        for file in replaced:
            file.remove()

    def _write_first(self) -> None:
        """The settings, once the model's hash is known, and the plan."""
        assert self.journal is not None
        while self._unwritten:
            record = self._unwritten[0]
            if record["kind"] == "settings":
                while not self._hashing.wait(PAUSE):
                    if self._stopping:
                        raise _Stopped
                record["inputs"]["the model"] = self._hashing.result()
            self.journal.append(record)
            del self._unwritten[0]

    # -- reporting ----------------------------------------------------------------------------

    def peak_memory(self, now: dict[str, int]) -> dict[str, int]:
        """The highest of all runs."""
        return highest([now, *(record["peak_memory"] for record in self.blocks)])


def without_unread(config: PruneConfig) -> dict[str, Any]:
    """The options that the results depend on."""
    return {name: value for name, value in asdict(config).items() if name not in UNREAD}


def _latest(records: list[Record], name: str, default: Any) -> Any:
    return next((record[name] for record in reversed(records) if name in record), default)


def _restore_block(job: Job, record: Record, directory: Path) -> None:
    job.linears += [LinearResult.restored(found) for found in record["linears"]]
    job.reconstruction += [BlockReconstruction(**found) for found in record["reconstruction"]]
    job.warnings += record["warnings"]
    job.partly_paired += [(paired, tokens) for paired, tokens in record["partly_paired"]]
    if record["part"] is None:
        return
    part = Part(check_file(directory, record["part"]), record["part"]["packed"])
    if job.writer is not None:
        job.writer.restore(part)
    else:
        job.parts |= {tensor.name: tensor for tensor in read_header(part.file)}
