"""Keys and values of past tokens, in the layout that decode attention reads.

Shape letters: S = slots (sequences that fit), K = key-value heads, T = capacity in tokens,
D = head size, L = LANES.
"""

from __future__ import annotations

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
        keys: [S, K, T / L, D, L]: 16 tokens innermost, so that scores need no sum across lanes.
        values: [S, K, T, D rounded up to L].
        head_size: D.
    """

    keys: Tensor
    values: Tensor
    head_size: int

    @staticmethod
    def allocate(
        slots: int, kv_heads: int, capacity: int, head_size: int, dtype: torch.dtype
    ) -> KeyValueCache:
        """Zeros for ``slots`` sequences of ``capacity`` tokens, rounded up to 16.

        Raises:
            ValueError: a size below 1, or a head size above 256.
        """
        sizes = {"slots": slots, "kv_heads": kv_heads, "capacity": capacity}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} {size}: must be at least 1")
        if not 1 <= head_size <= MAX_HEAD_SIZE:
            raise ValueError(f"head_size {head_size}: must be between 1 and {MAX_HEAD_SIZE}")
        capacity = _round_up(capacity)
        keys = torch.zeros(slots, kv_heads, capacity // LANES, head_size, LANES, dtype=dtype)
        values = torch.zeros(slots, kv_heads, capacity, _round_up(head_size), dtype=dtype)
        return KeyValueCache(keys, values, head_size)

    @property
    def slots(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that fit, a multiple of 16."""
        return self.values.shape[2]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def write(self, slot: int, start: int, keys_KTD: Tensor, values_KTD: Tensor) -> None:
        """Store tokens start, start + 1, ... of a sequence; keys already rotated.

        Raises:
            ValueError: they do not fit.
        """
        tokens = keys_KTD.shape[1]
        if start < 0 or start + tokens > self.capacity:
            raise ValueError(
                f"tokens {start} to {start + tokens}: the cache holds {self.capacity}; "
                "allocate a larger one"
            )
        at = torch.arange(start, start + tokens)
        # indices apart in a subscript put their dimension first: [T, K, D]
        self.keys[slot, :, at // LANES, :, at % LANES] = keys_KTD.transpose(0, 1)
        self.values[slot, :, start : start + tokens, : self.head_size] = values_KTD

    def read(self, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of a sequence: keys and values [K, T, D]."""
        keys_KTD = self.keys[slot].transpose(2, 3).flatten(1, 2)[:, :tokens]
        return keys_KTD, self.values[slot, :, :tokens, : self.head_size]
