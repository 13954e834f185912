"""Where a run works until its output is complete, and what keeps two runs apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from prune_llm.durability import CannotResume, sync_directory, sync_tree
from prune_llm.journal import finished
from prune_llm.verification import VerificationError

# errors that would come again: what was finished before them is of no use
FINAL = (ValueError, AssertionError, VerificationError)


def partial_directory(output: Path) -> Path:
    """Where the run works whose output this is."""
    return output.parent / f".{output.name}.partial"


class Staging:
    """A hidden directory beside the output where a run works; it becomes the output at the end.

    Until `publish` the output does not exist, so that a crash never leaves a directory that looks
    finished. A lock keeps two runs apart. What a stopped run has finished stays for the next one;
    of a run that has finished nothing, or ends by an error that would come again, nothing does.

    Args:
        resume: go on with what a stopped run has finished; restart: discard it. Where there is
            something and neither is given, entering raises ValueError.

    Attributes:
        found: what a stopped run has finished, in words.
        taken: whether it is this run's, too: until then an error leaves it as it is.
    """

    def __init__(self, output: Path, resume: bool = False, restart: bool = False) -> None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"output {str(output)!r}: exists and is not empty; give a new one")
        if resume and restart:
            raise ValueError("resume and restart: one goes on, one begins anew; give one of them")
        self.output = output
        self.directory = partial_directory(output)
        self._resume, self._restart = resume, restart
        self.found: str | None = None
        self.taken = self.published = False

    def __enter__(self) -> Staging:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._look()
        except BaseException:
            self._unlock()
            raise
        return self

    def _locked(self) -> IO[str]:
        lock = self.output.parent / f".{self.output.name}.lock"
        while True:
            opened = lock.open("w")
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                opened.close()
                raise ValueError(
                    f"output {str(self.output)!r}: another run is writing it; wait or give another "
                    "one"
                ) from None
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(opened.fileno())):
                return opened
            opened.close()  # of a run that ended just now, which has removed it

    def _look(self) -> None:
        """What a run before this one has left."""
        if not self._restart:
            self.found = finished(self.directory)
            if self.found is not None and not self._resume:
                raise ValueError(
                    f"output {str(self.output)!r}: a stopped run of prune has {self.found} done; "
                    "give --resume to go on, or --restart to discard that"
                )
        if self.found is None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(exist_ok=True)

    def publish(self, finished: Path | None = None) -> None:
        """Give the finished directory, or one inside of it, its name, in one step."""
        finished = finished or self.directory
        sync_tree(finished)
        os.replace(finished, self.output)
        self.published = True
        sync_directory(self.output.parent)

    def keeps(self, error: BaseException) -> bool:
        """Whether the next run can go on."""
        if isinstance(error, CannotResume) or (self.found is not None and not self.taken):
            return True
        return not isinstance(error, FINAL) and finished(self.directory) is not None

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is None or self.published or not self.keeps(error):
            shutil.rmtree(self.directory, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):
            Path(self._lock.name).unlink()
        self._lock.close()
