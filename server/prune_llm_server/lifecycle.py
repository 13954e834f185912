"""Loading, serving, draining, ending: what the runner and the application tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prune_llm_server.errors import ApiError

End = Callable[[ApiError], None]


class Lifecycle:
    """One server's way from loading to its end.

    Attributes:
        loaded: the engine started.
        failure: why it did not.
        draining: no new request is taken; running ones finish.
        exit_code: not None: end now, with this code.
    """

    def __init__(self) -> None:
        self.loaded = False
        self.failure: Exception | None = None
        self.draining = False
        self.exit_code: int | None = None
        self._running: set[End] = set()

    @property
    def running(self) -> int:
        """Requests that were taken and are not answered yet."""
        return len(self._running)

    @contextmanager
    def holding(self, end: End) -> Iterator[None]:
        """While a request runs; ``end`` ends it with an error."""
        self._running.add(end)
        try:
            yield
        finally:
            self._running.discard(end)

    def drain(self) -> None:
        """Take no new requests; end when those that run are answered."""
        self.draining = True

    def stop_with(self, code: int) -> None:
        """End now with this exit code, for an engine that is dead for good. From any thread."""
        self.draining = True
        self.exit_code = code

    def end_running(self, error: ApiError) -> int:
        """Answer every running request with an error; returns how many there were."""
        ends = list(self._running)
        for end in ends:
            end(error)
        return len(ends)
