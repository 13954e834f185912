"""The decoder block in memory: its statistics, its new weights, its run on the calibration samples.

Shape letters: S = samples, T = tokens of one sample, D = hidden size, I = input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prune_llm.architecture import Linear
from prune_llm.checkpoint import DTYPES
from prune_llm.pairing import Read, Routing, paired_rows, silenced
from prune_llm.sites import Site, Stage, stages_of, within_budget
from prune_llm.statistics import InputStatistics, Needs, all_finite, statistics_nbytes
from prune_llm.streams import Captured, Stream, hidden_of

if TYPE_CHECKING:
    from prune_llm.blocks import Walk

# tokens on which the layer error is measured
ERROR_TOKENS = 128
# batches on which a change of a block's output is measured
CHANGE_BATCHES = 2
# of the sites that are measured in one pass; more take another pass through the block
STATISTICS_BYTES = 4 << 30


class Block:
    """The resident decoder block. Prune it through `statistics` and `assign`."""

    def __init__(
        self,
        walk: Walk,
        index: int,
        linears: list[Linear],
        stream: Stream | None,
        dense: Stream | None = None,
    ) -> None:
        self.index = index
        self.name = walk.architecture.block_name(index)
        self.linears = linears
        self._walk, self._stream, self._dense = walk, stream, dense
        self.module = walk.architecture.blocks[index]
        self._dense_weights = [] if dense is None else [linear.module.weight for linear in linears]
        self._staged = dense is not None and walk.dense_target
        self._passed = False
        self._ahead = False  # whether the dense stream is behind this block already
        self._first_batches: dict[int, Tensor] = {}  # outputs, see `output_change`
        self._held: list[tuple[Linear, Tensor]] | None = None
        self._passes, self._ran = 1, 0  # over all batches: how many there will be, batches run

    def weight_OI(self, linear: Linear) -> Tensor:
        """The dense weight, float32 [O, I] on the device, at the precision it is stored in."""
        disk_name = self._walk.architecture.disk_names[linear.weight_name]
        stored = self._walk.checkpoint.tensor(disk_name)
        same = DTYPES[stored.dtype] == self._walk.dtype
        weight = linear.weight.detach() if same else stored.read()
        return linear.to_OI(weight).to(self._walk.device, torch.float32)

    def assign(self, linear: Linear, stored: Tensor) -> None:
        """Give a linear its pruned weight, in the module's own orientation."""
        weight = stored.to(self._walk.device, self._walk.dtype)
        weight = self._walk.residence.settled(linear.weight_name, weight)
        if self._held is None:
            linear.module.weight = nn.Parameter(weight, requires_grad=False)
        else:  # sites of the dense block are still to be measured
            self._held.append((linear, weight))

    def statistics(self, needs: Needs) -> Iterator[tuple[Site, InputStatistics | None]]:
        """Each site with its statistics, which are freed with it.

        With a dense target a site is measured when the sites before it have been assigned, so that
        it can undo what they broke.
        """
        stages = self._stages() if self._staged else [None]
        passes = [(stage, group) for stage in stages for group in self._groups(needs, stage)]
        self._passes = len(passes)
        # without stages all sites are to be measured on the dense block
        self._held = [] if len(stages) < len(passes) and not self._staged else None
        for stage, group in passes:
            part = None if stage is None else replace(stage, sites=group)
            collected = self.collect(needs, part, group)
            for site in list(collected):
                yield site, collected.pop(site)
        held, self._held = self._held or [], None
        for linear, weight in held:
            linear.module.weight = nn.Parameter(weight, requires_grad=False)

    def _groups(self, needs: Needs, stage: Stage | None) -> list[tuple[Site, ...]]:
        """Sites that are measured in one pass: as many as their statistics leave room for."""
        if self._stream is None:
            return [()]
        sites = self._sites() if stage is None else stage.sites
        sizes = [statistics_nbytes(site.width, needs, self._staged) for site in sites]
        return within_budget(list(sites), sizes, STATISTICS_BYTES)

    def _stages(self) -> list[Stage]:
        sites, walk = self._sites(), self._walk
        found = stages_of(sites, lambda: hidden_of(self._first_batch()), walk.adding)
        if walk.ranks.count == 1:
            return found
        walk.adding = walk.ranks.of_first(walk.adding)
        return stages_of(sites, lambda: hidden_of(self._first_batch()), walk.adding)

    @torch.no_grad()
    def collect(
        self, needs: Needs, stage: Stage | None = None, group: tuple[Site, ...] = ()
    ) -> dict[Site, InputStatistics | None]:
        """Statistics of each site (of a stage, or of a group) over all samples, in one pass."""
        if self._stream is None:
            return {Site((linear,)): None for linear in self.linears}
        sites = group or (self._sites() if stage is None else stage.sites)
        device, dense = self._walk.device, self._staged
        statistics = {site: InputStatistics(site.width, device, needs, dense) for site in sites}
        for number in range(len(self._stream)):
            if stage is None:
                self._collect_batch(number, statistics)
            else:
                self._collect_pairs(number, statistics, stage)
            self._ran += 1
            if self._ran % self._passes == 0:
                self._walk.tick(self.index, "calibrating")
        for site in sites:
            self._finish(site, statistics[site])
        return dict(statistics)

    @property
    def _sample(self) -> int:
        """Tokens of each batch on which the layer error is measured."""
        assert self._stream is not None
        return -(-ERROR_TOKENS // self._walk.batches)

    def _collect_batch(self, number: int, statistics: dict[Site, InputStatistics]) -> None:
        assert self._stream is not None

        def add(site: Site, x: Tensor) -> None:
            statistics[site].update(x, self._sample)

        self._visit(self._stream, number, statistics, add)

    def _collect_pairs(
        self, number: int, statistics: dict[Site, InputStatistics], stage: Stage
    ) -> None:
        """One batch through the dense block, then through the block as it is now."""
        assert self._stream is not None and self._dense is not None
        with Routing(self.module).watched() as routing, silenced(stage.silent):
            with self._as_dense():
                dense, dense_rest = self._reads(self._dense, number, stage, routing)
            ours, rest = self._reads(self._stream, number, stage, routing)
        shift_TD = None
        if dense_rest is not None and rest is not None:
            shift_TD = (dense_rest.float() - rest.float()).flatten(0, -2)
        for site, read in ours.items():
            rows_TI, paired = paired_rows(read, dense.get(site))
            shift = shift_TD if paired == len(rows_TI) else None
            statistics[site].update_pair(read.x_TI, rows_TI, paired, shift, self._sample)

    def _reads(
        self, stream: Stream, number: int, stage: Stage, routing: Routing
    ) -> tuple[dict[Site, Read], Tensor | None]:
        """What the sites of a stage read of a batch, and what its output is added to."""
        tokens = stream[number][..., 0].numel()
        reads: dict[Site, Read] = {}

        def keep(site: Site, x: Tensor) -> None:
            reads[site] = routing.read(site.linears[0].kind, x.clone(), tokens)

        output = self._visit(stream, number, stage.sites, keep, to_the_end=bool(stage.silent))
        return reads, hidden_of(output) if stage.silent else None

    def _visit(
        self,
        stream: Stream,
        number: int,
        sites: Iterable[Site],
        visit: Callable[[Site, Tensor], None],
        to_the_end: bool = False,
    ) -> Any:
        """Run one batch and show what each site reads; stops when all were, unless to the end."""
        waiting: set[Site | None] = {*sites, None} if to_the_end else {*sites}
        handles = [
            site.linears[0].module.register_forward_pre_hook(_visitor(site, visit, waiting))
            for site in sites
        ]
        try:
            return self._run(number, stream)
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _as_dense(self) -> Iterator[None]:
        """The block as it was before anything was assigned."""
        pruned = [linear.module.weight for linear in self.linears]
        try:
            for linear, weight in zip(self.linears, self._dense_weights, strict=True):
                linear.module.weight = weight
            yield
        finally:
            for linear, weight in zip(self.linears, pruned, strict=True):
                linear.module.weight = weight

    def _sites(self) -> list[Site]:
        return self._walk.sites(self.index, self.linears, self._first_batch)

    def _first_batch(self) -> Any:
        assert self._stream is not None
        return self._run(0, self._stream)

    def _finish(self, site: Site, statistics: InputStatistics) -> None:
        statistics.add_up(self._walk.ranks)
        statistics.finish()
        if not all_finite(statistics.square_sum_I):
            self._check_finite()
            raise ValueError(
                f"{self.name}.{site.linears[0].kind}: its calibration inputs are not finite; "
                "run with --dtype float32 or check the model's weights"
            )

    def _check_finite(self) -> None:
        """Raise ValueError where a weight of the block is why its activations are no numbers."""
        for name, parameter in self.module.named_parameters():
            if not all_finite(parameter):
                raise ValueError(f"{self.name}.{name}: holds NaN or infinite weights")

    def pass_on(self) -> None:
        """Move the streams behind this block and let go of its weights; once."""
        if self._passed:
            return
        self._passed = True
        if self._stream is not None:
            if self.index + 1 < len(self._walk.architecture.blocks):
                self.propagate()
            else:
                self._walk.drop_streams()
        self._dense_weights.clear()
        self._first_batches.clear()
        self._walk.residence.release(self.index)

    @torch.no_grad()
    def propagate(self) -> None:
        """Replace the streams by this block's outputs."""
        assert self._stream is not None
        for number in range(len(self._stream)):
            self._advance(number, self._stream)
            if self._dense is not None and not self._ahead:
                with self._as_dense():
                    self._advance(number, self._dense)
            self._walk.tick(self.index, "running the pruned block")

    @property
    def walk(self) -> Walk:
        return self._walk

    @property
    def stream(self) -> Stream:
        """What the pruned model feeds the block."""
        assert self._stream is not None
        return self._stream

    @torch.no_grad()
    def dense_outputs(self) -> Stream:
        """The dense stream, moved behind this block before `propagate` does."""
        assert self._dense is not None and not self._ahead
        with self._as_dense():
            for number in range(len(self._dense)):
                self._advance(number, self._dense)
        self._ahead = True
        return self._dense

    def _advance(self, number: int, stream: Stream) -> None:
        stream.replace(number, hidden_of(self._run(number, stream)))

    def _run(self, number: int, stream: Stream) -> Any:
        hidden_STD = stream[number].to(self._walk.device, non_blocking=True)
        call = stream.calls[len(hidden_STD)][self.index]
        try:
            return self._walk.run(self.index, hidden_STD, call)
        except Captured:
            return None

    @torch.no_grad()
    def output_change(self, linear: Linear, weight_OI: Tensor) -> float:
        """Mean over tokens of ||h' - h||^2 / ||h||^2: what another weight of a linear does to the
        block's output h, on the first batches."""
        if not self._walk.ranks.first:
            return self._walk.ranks.of_first(0.0)
        return self._walk.ranks.of_first(self._output_change(linear, weight_OI))

    def _output_change(self, linear: Linear, weight_OI: Tensor) -> float:
        assert self._stream is not None
        total, count = 0.0, 0
        dense = linear.module.weight
        for number in range(min(CHANGE_BATCHES, len(self._stream))):
            if number not in self._first_batches:
                self._first_batches[number] = hidden_of(self._run(number, self._stream))
            before = self._first_batches[number]
            try:
                other = linear.from_OI(weight_OI).to(self._walk.device, self._walk.dtype)
                linear.module.weight = nn.Parameter(other, requires_grad=False)
                after = hidden_of(self._run(number, self._stream))
            finally:
                linear.module.weight = dense
            whole_ST = before.float().square().sum(dim=-1).clamp_min_(1e-30)
            total += float(((after - before).float().square().sum(dim=-1) / whole_ST).sum())
            count += whole_ST.numel()
        return total / count


def _visitor(
    site: Site, visit: Callable[[Site, Tensor], None], waiting: set[Site | None]
) -> Callable[..., None]:
    """A hook that shows a linear's input; when no site waits any more it ends the pass."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        visit(site, args[0])
        waiting.discard(site)
        if not waiting:
            raise Captured

    return hook
