"""The hash of a checkpoint, made beside the work."""

from __future__ import annotations

import threading

from prune_llm.checkpoint import Checkpoint


class Hashing:
    """A checkpoint's hash in the making, beside other work; a stopped program does not wait."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._found: str | BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._checkpoint.sha256()
        except BaseException as error:  # raised again where the result is asked for
            self._found = error

    def wait(self, seconds: float) -> bool:
        """Whether it is known, after at most so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> str:
        """Wait for the hash; raises what reading the checkpoint raised."""
        self._thread.join()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found
