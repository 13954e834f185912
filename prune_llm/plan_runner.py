"""Rows of many sequences through one recorded plan, over a paged cache.

Shape letters: B = rows, W = rows whose logits are wanted, D = hidden size, V = vocabulary,
N = pages of a sequence, S = sequences that run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prune_llm.activation.decoding import ModelLevels, PlanGates
from prune_llm.activation.levels import DENSE
from prune_llm.device_sampling import DeviceSampler, Needs
from prune_llm.parts import ModelParts
from prune_llm.pinned import HostCopy, host_to
from prune_llm.recording import Head, Recording, rotary_angles
from prune_llm.sampling import DRAWN
from prune_llm.segments import (
    SCORED_ROWS,
    BatchLimits,
    Ran,
    Segment,
    cache_size,
    model_context,
)
from prune_llm_kernels.gpu_graph import Recorded
from prune_llm_kernels.kv_cache import LANES, KeyValueCache
from prune_llm_kernels.plan import DevicePlan

_FEW_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)


class PlanRunner:
    """One plan with a row for every token of a step.

    Attributes:
        ways: on a GPU, which way the products of each shape and batch take, by measurement.
    """

    name = "prune_llm kernels"
    shares = True
    piece = 1

    def __init__(
        self,
        parts: ModelParts,
        levels: ModelLevels | None,
        limits: BatchLimits,
        ways: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self.limits, self.ways, self._embedding_VD = limits, ways, parts.embedding_VD
        device = self._device = parts.device
        self._pads = records_rows(device)
        self.warm_rows = row_numbers(limits.max_rows) if self._pads else ()
        self.vocabulary = min(len(parts.embedding_VD), parts.head.out_features)
        self.levels = (DENSE,) if levels is None else tuple(levels.table.names)
        context = model_context(parts.model)
        self.pages, self.context = cache_size(limits, plan_token_bytes(parts), context)
        rows, longest = limits.max_rows + limits.chunk_tokens, -(-self.context // limits.page_size)
        self._table_SN = torch.zeros(
            limits.max_rows, min(longest, self.pages), dtype=torch.int64, device=device
        )
        self._tabled = [0] * limits.max_rows  # pages of each sequence that the table has
        self._pages_BN = self._table_SN.new_zeros(rows, self._table_SN.shape[1])
        self._positions_B = torch.full((rows,), -1, device=device)
        self._gates = None if levels is None else PlanGates(levels, rows, device)
        # levels of the rows as the gates have them; None: left out
        self._names: list[str | None] = []
        self._blocks = Recording(
            parts,
            _plan_caches(parts, self.pages, limits.page_size),
            self._pages_BN,
            self._positions_B,
            rotary_angles(parts.model, self._table_SN.shape[1] * limits.page_size),
            self._gates,
        )
        wanted = limits.max_rows + SCORED_ROWS
        self._head = Head(parts, parts.embedding_VD.new_zeros(wanted, parts.embedding_VD.shape[1]))
        self.draws = isinstance(self._head.plan, DevicePlan)
        self._drawing: DeviceSampler | None = None
        self._draws: dict[tuple[int, Needs], Recorded] = {}
        if self.draws:
            self._drawing = DeviceSampler(limits.max_rows, wanted, parts.head.out_features, device)

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> Ran:
        """Waits for the device nowhere: whoever reads the logits does."""
        rows = self._place(segments)
        self._choose_levels(segments, rows)
        self._blocks.plan.run(rows)
        shares: Callable[[], list[float | None]] = partial(_no_shares, len(segments))
        if self._gates is not None:
            noted, dense = self._gates.note_run(), self._names.count(DENSE)
            shares = partial(_shares, self._gates, noted, dense, [s.level for s in segments])
        logits_WV, tokens_W = self._run_head(segments)
        return Ran(logits_WV, shares, tokens_W)

    def leave(self, slot: int) -> None:
        self._tabled[slot] = 0
        if self._drawing is not None:
            self._drawing.leave(slot)

    def _rows(self, count: int, most: int) -> int:
        """How many are run for ``count`` that are there."""
        return padded(count, most) if self._pads else count

    def _place(self, segments: Sequence[Segment]) -> int:
        """Embeddings, positions and pages of the rows; how many to run."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for segment in segments:
            count = len(segment.tokens)
            tokens += segment.tokens
            positions += range(segment.start, segment.start + count)
            slots += [segment.slot] * count
            self._list_pages(segment)
        count, used = len(tokens), max(len(segment.pages) for segment in segments)
        rows = self._rows(count, len(self._positions_B))
        left_out = [-1] * (rows - count)
        placed = torch.tensor([positions + left_out, tokens + left_out, slots + left_out])
        positions_B, ids_B, slots_B = host_to(self._device, placed)
        self._positions_B[:rows] = positions_B
        pages_BN = self._table_SN[:, :used].index_select(0, slots_B[:count])
        self._pages_BN[:count, :used] = pages_BN
        x_BD = self._blocks.x_BD
        if self._drawing is not None and DRAWN in tokens:
            ids_B = self._drawing.filled(ids_B[:count], slots_B[:count], len(self._embedding_VD))
        torch.index_select(self._embedding_VD, 0, ids_B[:count], out=x_BD[:count])
        x_BD[count:rows] = 0  # what an earlier run left could be no number
        return rows

    def _list_pages(self, segment: Segment) -> None:
        """Pages are only ever added to a sequence."""
        known, count = self._tabled[segment.slot], len(segment.pages)
        if known < count:
            new = torch.tensor(segment.pages[known:])
            self._table_SN[segment.slot, known:count] = host_to(self._device, new)
            self._tabled[segment.slot] = count

    def _choose_levels(self, segments: Sequence[Segment], rows: int) -> None:
        if self._gates is None:
            return
        names: list[str | None] = [s.level or DENSE for s in segments for _ in s.tokens]
        names += [None] * (rows - len(names))
        if names != self._names:
            self._gates.choose_rows(names)
            self._names = names

    def _run_head(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
        """Logits of the wanted rows, and the tokens that were drawn of some."""
        wanted: list[int] = []
        drawers: list[int | None] = []  # the slot whose token is drawn behind a wanted row
        end = 0
        for segment in segments:
            end += len(segment.tokens)
            wanted += range(end - segment.wanted, end)
            drawers += [None] * segment.wanted
            if segment.sampler is not None and self._drawing is not None:
                self._drawing.take(segment.slot, segment.sampler)
                drawers[-1] = segment.slot
        count, drawing = len(wanted), self._drawing
        logits_WV = self._head.logits_BV[:count]
        if not count:
            return logits_WV, None
        rows = self._rows(count, len(self._head.x_BD))
        chosen = torch.tensor(wanted + wanted[-1:] * (rows - count))
        torch.index_select(
            self._blocks.x_BD, 0, host_to(self._device, chosen), out=self._head.x_BD[:rows]
        )
        if drawing is None or drawers == [None] * count:
            self._head.plan.run(rows)
            return logits_WV, None
        self._draw(rows, drawing.place(drawers + [None] * (rows - count)))
        return logits_WV, drawing.tokens_B[:count]

    def _draw(self, rows: int, needs: Needs) -> None:
        """Head and samplers, in one graph."""
        if (rows, needs) not in self._draws:
            operations = partial(self._draw_operations, rows, needs)
            self._draws[rows, needs] = Recorded(operations, self._device)
        self._draws[rows, needs]()

    def _draw_operations(self, rows: int, needs: Needs) -> None:
        plan = self._head.plan
        assert isinstance(plan, DevicePlan) and self._drawing is not None
        plan.replay(rows)
        self._drawing.draw(self._head.logits_BV[:rows], needs)


def _no_shares(count: int) -> list[float | None]:
    return [None] * count


def _shares(
    gates: PlanGates, noted: HostCopy, dense: int, levels: Sequence[str | None]
) -> list[float | None]:
    share = gates.run_active(noted, dense)
    return [share if level not in (None, DENSE) else None for level in levels]


def records_rows(device: torch.device) -> bool:
    """Whether a plan is recorded anew for every number of rows: then only a few are used."""
    return device.type == "cuda"


def padded(rows: int, most: int) -> int:
    """The next number of rows that is used: 1, 2, 3, 4, 6, 8, 12, then multiples of 16."""
    found = next((n for n in _FEW_ROWS if n >= rows), -(-rows // 16) * 16)
    return min(found, most)


def row_numbers(most: int) -> tuple[int, ...]:
    """All numbers of rows that up to ``most`` are padded to."""
    return tuple(sorted({padded(n, most) for n in range(1, most + 1)}))


def _plan_caches(parts: ModelParts, pages: int, page_size: int) -> list[KeyValueCache]:
    first = parts.blocks[0]
    kv_heads = first.key.out_features // first.head_size
    sizes = pages, kv_heads, page_size, first.head_size
    return [KeyValueCache.allocate(*sizes, parts.dtype, parts.device) for _ in parts.blocks]


def plan_token_bytes(parts: ModelParts) -> int:
    return sum(cache.nbytes for cache in _plan_caches(parts, 1, LANES)) // LANES
