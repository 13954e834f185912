"""Walk a model block by block: load one, see its inputs, let the caller prune it, run it, free it.

Calibration activations flow through the blocks as the caller left them, so every block is
calibrated on what the pruned model will really feed it. Only one block holds weights at a time.
With ``dense_target`` a second stream flows through the blocks as they were: the dense model's. A
block is then run once for each of its sites, after the sites before it were pruned, and holds its
dense weights beside the pruned ones. What is trained towards the dense model (``goal``) needs that
stream too, or the one behind its last block.
Shape letters: S = samples, T = tokens of one sample, D = hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prune_llm.architecture import Architecture, Linear
from prune_llm.attention import FastAttention
from prune_llm.checkpoint import DTYPES, Checkpoint
from prune_llm.fused_block import FusedBlock, agrees, is_plain_call
from prune_llm.memory import trim_heap
from prune_llm.pairing import Read, Routing, paired_rows, silenced
from prune_llm.sites import Site, Stage, _complete, _observe, stages_of, within_budget
from prune_llm.statistics import InputStatistics, Needs, all_finite, statistics_nbytes

# tokens on which the layer error is measured
ERROR_TOKENS = 128
# batches on which a change of a block's output is measured
CHANGE_BATCHES = 2
# of the sites that are measured in one pass; more take another pass through the block
STATISTICS_BYTES = 4 << 30
# on which a block is compared with its fused form
PROBE_TOKENS = 64

Tick = Callable[[int, str], None]


class _Captured(Exception):
    """Raised inside a forward pass when what was wanted has been seen."""


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What a model's own code raises, as one line that names the module."""
    try:
        yield
    except (_Captured, ValueError, AssertionError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name}: fails when it runs ({type(error).__name__}: {reason}); config.json and the "
            "weights may not be of one model, or transformers of another version"
        ) from error


@dataclass(frozen=True)
class Call:
    """How the model calls one block: everything but the hidden states, and how it answers."""

    positional: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def is_plain(self, hidden_STD: Tensor) -> bool:
        """Whether a fused block may take the call (see `fused_block.is_plain_call`)."""
        return not self.args and is_plain_call(hidden_STD, self.kwargs)

    def run(self, block: nn.Module, hidden_STD: Tensor) -> Any:
        if self.positional:
            return block(hidden_STD, *self.args, **self.kwargs)
        return block(*self.args, hidden_states=hidden_STD, **self.kwargs)


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(True, args[1:], kwargs)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call(False, args, rest)


@dataclass
class Stream:
    """Hidden states between two blocks, in batches on the CPU, and how to call each block.

    ``calls`` holds one list (an entry per block) for each batch size that occurs.
    """

    batches: list[Tensor]
    calls: dict[int, list[Call]] = field(default_factory=dict)

    def sample(self, number: int) -> Tensor:
        """The hidden states of one sample [1, T, D]; batches but the last are of one size."""
        size = len(self.batches[0])
        row = number % size
        return self.batches[number // size][row : row + 1]


class Walk:
    """Iterate over the decoder blocks of a checkpoint.

    Args:
        samples_ST: calibration token ids int64 [S, T]; None walks without running anything, for
            methods that need no data.
        select: which linears of a block are to be pruned.
        tick: told after every batch: the block's index and what is being done.
        dense_target: keep the dense model's stream as well, and measure sites against it.
        goal: of the reconstruction: "block" keeps the dense model's stream, "logits" that behind
            its last block (`final`) and the head; "none".
    """

    def __init__(
        self,
        architecture: Architecture,
        checkpoint: Checkpoint,
        samples_ST: Tensor | None,
        select: Callable[[list[Linear]], list[Linear]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        tick: Tick,
        dense_target: bool = False,
        goal: str = "none",
    ) -> None:
        self.dense_target, self.goal = dense_target, goal
        self.architecture, self.checkpoint = architecture, checkpoint
        self.device, self.dtype = device, dtype
        self._select, self._tick = select, tick
        self._batches = list(samples_ST.split(batch_size)) if samples_ST is not None else []
        self._site_names: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        self.adding: dict[tuple[str, ...], bool] = {}  # see `sites.stages_of`
        self._agrees: dict[str, bool] = {}  # by the block's modules
        self.fused: set[int] = set()  # blocks that run with our kernels around their linears
        self.final: Stream | None = None
        self._rest: tuple[Any, ...] | None = None  # what blocks return behind the hidden states

    def __iter__(self) -> Iterator[Block]:
        blocks = self.architecture.blocks
        stream = self._start() if self._batches else None
        dense = None
        if stream is not None and (self.dense_target or self.goal == "block"):
            dense = Stream(list(stream.batches), stream.calls)
        if stream is not None and self.goal == "logits":
            self.final = self._run_dense(stream)
            self._hold_head()
        for index in range(len(blocks)):
            self.load(index)
            if stream is not None:
                self._choose(index, stream)
            linears = self._select(self.architecture.linears(index))
            block = Block(self, index, linears, stream, dense)
            yield block
            if stream is not None and index + 1 < len(blocks):
                block.propagate()
            block.close()
            self.release(index)

    # -- weights in and out ------------------------------------------------------------------

    def load(self, index: int) -> None:
        """Read the block's parameters and persistent buffers from disk onto the device."""
        if not any(p.is_meta for p in self.architecture.blocks[index].parameters()):
            return  # block 0, which `_start` has run already
        prefix = self.architecture.block_name(index) + "."
        self._fill([n for n in self.architecture.model.state_dict() if n.startswith(prefix)])
        for name, parameter in self.architecture.blocks[index].named_parameters():
            assert not parameter.is_meta, f"{prefix}{name} was not loaded"

    def release(self, index: int) -> None:
        """Drop the block's weights and give the memory back to the system."""
        for module in self.architecture.blocks[index].modules():
            _empty_parameters(module)
        trim_heap()

    def _fill(self, names: list[str]) -> None:
        for name in names:
            disk_name = self.architecture.disk_names.get(name)
            if disk_name is None:
                continue  # a buffer that its module makes itself
            tensor = self.checkpoint.tensor(disk_name).read()
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            _set_tensor(self.architecture.model, name, tensor.to(self.device, dtype))

    # -- the stream of hidden states ----------------------------------------------------------

    @torch.no_grad()
    def _start(self) -> Stream:
        """Run the embeddings on every batch, and record how the model calls its blocks."""
        outside = self.architecture.outside_names()
        self._fill(outside)
        _move_buffers(self.architecture.model, self.device)
        stream = Stream([self._embed(batch) for batch in self._batches])
        self.load(0)
        for batch, hidden_STD in zip(self._batches, stream.batches, strict=True):
            if len(batch) not in stream.calls:
                stream.calls[len(batch)] = self._record(batch, hidden_STD)
        if self.goal != "none" and 1 not in stream.calls:
            stream.calls[1] = self._record(self._batches[0][:1], stream.batches[0][:1])
        for name in outside:
            _empty_parameters(self.architecture.model.get_submodule(name.rpartition(".")[0]))
        trim_heap()
        return stream

    def _embed(self, ids_ST: Tensor) -> Tensor:
        """The input of block 0 [S, T, D] on the CPU."""
        hidden_STD, _ = self._first_call(ids_ST)
        return hidden_STD.cpu()

    def _first_call(self, ids_ST: Tensor) -> tuple[Tensor, Call]:
        seen: list[tuple[Tensor, Call]] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            seen.append(_split_call(args, kwargs))
            raise _Captured

        self._run_base(ids_ST, [catch])
        return seen[0]

    def _record(self, ids_ST: Tensor, hidden_STD: Tensor) -> list[Call]:
        """How every block is called for a batch of this size, from a run that computes nothing.

        Raises:
            ValueError: what a block receives beside the hidden states depends on the tokens.
        """
        _, first = self._first_call(ids_ST)
        with _told(self.architecture.block_name(0)):
            answer = first.run(self.architecture.blocks[0], hidden_STD.to(self.device))
        self._rest = answer[1:] if isinstance(answer, tuple) else None
        calls = self._pass_through(ids_ST)
        again = self._pass_through(ids_ST.flip(1))
        for index, (one, other) in enumerate(zip(calls, again, strict=True)):
            if not _same(one, other):
                raise ValueError(
                    f"{self.architecture.block_name(index)}: is given more than the hidden states "
                    "of each token; this architecture is not supported"
                )
        return calls

    def _pass_through(self, ids_ST: Tensor) -> list[Call]:
        calls: list[Call] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            hidden_STD, call = _split_call(args, kwargs)
            calls.append(call)
            return hidden_STD if self._rest is None else (hidden_STD, *self._rest)

        self._run_base(ids_ST, [note] * len(self.architecture.blocks))
        return calls

    def _run_base(self, ids_ST: Tensor, forwards: list[Callable[..., Any]]) -> None:
        """Run the base model with the forward of its first blocks replaced."""
        with suppress(_Captured):
            self._run_model(self.architecture.model.base_model, ids_ST, forwards)

    def _run_model(self, model: Any, ids_ST: Tensor, forwards: list[Callable[..., Any]]) -> Any:
        blocks = list(self.architecture.blocks)[: len(forwards)]
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        try:
            with _told(type(model).__name__):
                return model(input_ids=ids_ST.to(self.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward

    @torch.no_grad()
    def _run_dense(self, start: Stream) -> Stream:
        """The dense model's stream behind its last block."""
        stream = Stream(list(start.batches), start.calls)
        for index in range(len(self.architecture.blocks)):
            self.load(index)
            for number, batch in enumerate(stream.batches):
                call = stream.calls[len(batch)][index]
                output = self.run(index, batch.to(self.device), call)
                stream.batches[number] = hidden_of(output).cpu()
            self.release(index)
            self.tick(index, "running the dense model")
        return stream

    def _hold_head(self) -> None:
        """Read what lies outside the blocks, the output head too, for `predict`."""
        prefix = self.architecture.blocks_name + "."
        names = [n for n in self.architecture.model.state_dict() if not n.startswith(prefix)]
        self._fill(names)

    def predict(self, hidden_STD: Tensor) -> Tensor:
        """Logits [S, T, V] of hidden states behind the last block; for the goal "logits"."""

        def give(*_args: Any, **_kwargs: Any) -> Any:
            return hidden_STD if self._rest is None else (hidden_STD, *self._rest)

        ids_ST = torch.zeros(hidden_STD.shape[:2], dtype=torch.int64)
        forwards = [give] * len(self.architecture.blocks)
        logits: Tensor = self._run_model(self.architecture.model, ids_ST, forwards).logits
        return logits

    # -- which linears share an input ---------------------------------------------------------

    def sites(self, index: int, linears: list[Linear], run: Callable[[], None]) -> list[Site]:
        """Group the linears of a block by the tensor they read, found by running it once.

        Blocks with the same linears group alike, so the first of each sort is run.

        Raises:
            ValueError: a linear reads nothing when the block runs, or more than one input.
        """
        kinds = tuple(linear.kind for linear in linears)
        if kinds not in self._site_names:
            self._site_names[kinds] = _observe(linears, run)
        by_kind = {linear.kind: linear for linear in linears}
        grouped = _complete(self._site_names[kinds], kinds)
        reads = Counter(kind for names in grouped for kind in names)
        for kind in kinds:
            if reads[kind] != 1:
                how = "several different inputs" if reads[kind] else "no input"
                raise ValueError(
                    f"{self.architecture.block_name(index)}.{kind}: reads {how} when the model "
                    f"runs, so it cannot be calibrated; leave it dense with --ignore {kind}"
                )
        return [Site(tuple(by_kind[kind] for kind in names)) for names in grouped]

    # -- running a block ----------------------------------------------------------------------

    def run(self, index: int, hidden_STD: Tensor, call: Call) -> Any:
        """Run the resident block, with our kernels around its linears where they agree with it."""
        block = self.architecture.blocks[index]
        with _told(self.architecture.block_name(index)):
            if index in self.fused and call.is_plain(hidden_STD):
                return FusedBlock(block)(hidden_STD, call.kwargs["position_embeddings"])
            with FastAttention():
                return call.run(block, hidden_STD)

    def _choose(self, index: int, stream: Stream) -> None:
        """Compare a block with its fused form, once for each sort, on the first tokens."""
        block, hidden_STD = self.architecture.blocks[index], stream.batches[0]
        call, sort = stream.calls[len(hidden_STD)][index], repr(block)
        if not call.is_plain(hidden_STD):
            return
        if sort not in self._agrees:
            cosine, sine = call.kwargs["position_embeddings"]
            angles = cosine[:, :PROBE_TOKENS], sine[:, :PROBE_TOKENS]
            probe_STD = hidden_STD[:1, :PROBE_TOKENS].to(self.device)
            self._agrees[sort] = agrees(block, probe_STD, angles)
        if self._agrees[sort]:
            self.fused.add(index)

    def tick(self, index: int, phase: str) -> None:
        self._tick(index, phase)


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
        if self._held is not None:  # sites of the dense block are still to be measured
            self._held.append((linear, stored))
            return
        weight = stored.to(self._walk.device, self._walk.dtype)
        linear.module.weight = nn.Parameter(weight, requires_grad=False)

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
        for linear, stored in held:
            self.assign(linear, stored)

    def _groups(self, needs: Needs, stage: Stage | None) -> list[tuple[Site, ...]]:
        """Sites that are measured in one pass: as many as their statistics leave room for."""
        if self._stream is None:
            return [()]
        sites = self._sites() if stage is None else stage.sites
        sizes = [statistics_nbytes(site.width, needs, self._staged) for site in sites]
        return within_budget(list(sites), sizes, STATISTICS_BYTES)

    def _stages(self) -> list[Stage]:
        return stages_of(self._sites(), lambda: hidden_of(self._first_batch()), self._walk.adding)

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
        for number in range(len(self._stream.batches)):
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
        return -(-ERROR_TOKENS // len(self._stream.batches))

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
        tokens = stream.batches[number][..., 0].numel()
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

    @torch.no_grad()
    def propagate(self) -> None:
        """Replace the streams by this block's outputs."""
        assert self._stream is not None
        for number in range(len(self._stream.batches)):
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
            for number in range(len(self._dense.batches)):
                self._advance(number, self._dense)
        self._ahead = True
        return self._dense

    def _advance(self, number: int, stream: Stream) -> None:
        stream.batches[number] = hidden_of(self._run(number, stream)).cpu()

    def _run(self, number: int, stream: Stream) -> Any:
        hidden_STD = stream.batches[number].to(self._walk.device)
        call = stream.calls[len(hidden_STD)][self.index]
        try:
            return self._walk.run(self.index, hidden_STD, call)
        except _Captured:
            return None

    @torch.no_grad()
    def output_change(self, linear: Linear, weight_OI: Tensor) -> float:
        """Mean over tokens of ||h' - h||^2 / ||h||^2: what another weight of a linear does to the
        block's output h, on the first batches."""
        assert self._stream is not None
        total, count = 0.0, 0
        dense = linear.module.weight
        for number in range(min(CHANGE_BATCHES, len(self._stream.batches))):
            if number not in self._first_batches:
                self._first_batches[number] = hidden_of(self._run(number, self._stream))
            before = self._first_batches[number]
            try:
                self.assign(linear, linear.from_OI(weight_OI))
                after = hidden_of(self._run(number, self._stream))
            finally:
                linear.module.weight = dense
            whole_ST = before.float().square().sum(dim=-1).clamp_min_(1e-30)
            total += float(((after - before).float().square().sum(dim=-1) / whole_ST).sum())
            count += whole_ST.numel()
        return total / count

    def close(self) -> None:
        """Let go of the dense weights, before the next block is read."""
        self._dense_weights.clear()
        self._first_batches.clear()


def hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _visitor(
    site: Site, visit: Callable[[Site, Tensor], None], waiting: set[Site | None]
) -> Callable[..., None]:
    """A hook that shows a linear's input; when no site waits any more it ends the pass."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        visit(site, args[0])
        waiting.discard(site)
        if not waiting:
            raise _Captured

    return hook


def _same(one: Call, other: Call) -> bool:
    for a, b in zip(tree_leaves(one.kwargs), tree_leaves(other.kwargs), strict=True):
        if isinstance(a, Tensor) and not (a.shape == b.shape and torch.equal(a, b)):
            return False
    return all(
        torch.equal(a, b)
        for a, b in zip(tree_leaves(one.args), tree_leaves(other.args), strict=True)
        if isinstance(a, Tensor)
    )


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _empty_parameters(module: nn.Module) -> None:
    for leaf, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[leaf] = nn.Parameter(
                torch.empty_like(parameter, device="meta"), requires_grad=False
            )


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
