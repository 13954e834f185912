"""Keys and values of past tokens, in the layout that decode attention reads.

The cache is cut into pages of so many tokens; a sequence's tokens lie on pages in any order, and
sequences may share pages. Where each has one page of its own, a page is a slot.

Shape letters: P = pages, K = key-value heads, T = tokens of a page, D = head size, L = LANES.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16  # kKeyLanes of csrc/decode.h
MAX_HEAD_SIZE = 256  # kMostHead of csrc/decode_loops.h


def _round_up(n: int) -> int:
    return -(-n // LANES) * LANES


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """The cache of one attention layer.

    Attributes:
        keys: [P, K, T / L, D, L]: 16 tokens innermost, so that scores need no sum across lanes.
        values: [P, K, T, D rounded up to L].
        head_size: D.
    """

    keys: Tensor
    values: Tensor
    head_size: int

    @staticmethod
    def allocate(
        pages: int,
        kv_heads: int,
        page_size: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> KeyValueCache:
        """Zeros for ``pages`` of ``page_size`` tokens, rounded up to 16.

        Raises:
            ValueError: a size below 1, or a head size above 256.
        """
        sizes = {"pages": pages, "kv_heads": kv_heads, "page_size": page_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} {size}: must be at least 1")
        if not 1 <= head_size <= MAX_HEAD_SIZE:
            raise ValueError(f"head_size {head_size}: must be between 1 and {MAX_HEAD_SIZE}")
        page_size = _round_up(page_size)
        key_shape = pages, kv_heads, page_size // LANES, head_size, LANES
        value_shape = pages, kv_heads, page_size, _round_up(head_size)
        keys = torch.zeros(key_shape, dtype=dtype, device=device)
        values = torch.zeros(value_shape, dtype=dtype, device=device)
        return KeyValueCache(keys, values, head_size)

    @property
    def pages(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page, a multiple of 16."""
        return self.values.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, page: int, start: int, keys_KTD: Tensor, values_KTD: Tensor) -> None:
        """Store tokens start, start + 1, ... of one page; keys already rotated.

        Raises:
            ValueError: they do not fit.
        """
        tokens = keys_KTD.shape[1]
        if start < 0 or start + tokens > self.page_size:
            raise ValueError(
                f"tokens {start} to {start + tokens}: a page holds {self.page_size}; "
                "allocate larger ones"
            )
        at = torch.arange(start, start + tokens)
        # indices apart in a subscript put their dimension first: [T, K, D]
        self.keys[page, :, at // LANES, :, at % LANES] = keys_KTD.transpose(0, 1)
        self.values[page, :, start : start + tokens, : self.head_size] = values_KTD

    def read(self, pages: Sequence[int], tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens on the pages, in their order: keys and values [K, T, D]."""
        keys_PKTD = self.keys[list(pages)].transpose(3, 4).flatten(2, 3)
        values_PKTD = self.values[list(pages), :, :, : self.head_size]
        keys_KTD, values_KTD = (x.transpose(0, 1).flatten(1, 2) for x in (keys_PKTD, values_PKTD))
        return keys_KTD[:, :tokens], values_KTD[:, :tokens]
