"""Pages of a key-value cache: which are held, and which hold tokens that other sequences can use.

A page is free, held by one or more sequences, or idle: held by none, its contents still registered
under the tokens they were made from. Knows neither tensors nor models.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

FIRST = bytes(32)  # the key in front of a sequence's first page


def page_key(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: of its tokens and, through the key before, of all tokens before it.

    256 bits of BLAKE2b: two contents with one key are not found even by someone who looks for them.
    """
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=32).digest()


class PagePool:
    """Hands out the pages 0, 1, ... of a cache."""

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"pages {pages}: must be at least 1")
        self._holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest idle first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def pages(self) -> int:
        return len(self._holders)

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.pages - self.available

    @property
    def idle(self) -> int:
        return len(self._idle)

    def take(self) -> int | None:
        """A page of one's own; None: all are held. Forgets what was idle longest where it must."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return None
        self._holders[page] = 1
        return page

    def register(self, page: int, key: bytes) -> None:
        """Let others adopt a held page; where a page of these contents is known, that one stays."""
        assert self._holders[page] and page not in self._key_of
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def adopt(self, key: bytes) -> int | None:
        """The page registered under a key, with one holder more; None: there is none."""
        page = self._page_of.get(key)
        if page is None:
            return None
        self._idle.pop(page, None)
        self._holders[page] += 1
        return page

    def is_held(self, key: bytes) -> bool:
        """Whether adopting this key would leave `available` as it is."""
        page = self._page_of.get(key)
        return page is not None and self._holders[page] > 0

    def release(self, pages: Sequence[int]) -> None:
        """One holder of each less. The last is forgotten first: it needs those in front of it."""
        for page in reversed(pages):
            assert self._holders[page] > 0
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)
