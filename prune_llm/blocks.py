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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_llm.architecture import Architecture, Linear
from prune_llm.attention import FastAttention
from prune_llm.block import Block
from prune_llm.checkpoint import Checkpoint
from prune_llm.fused_block import FusedBlock, agrees
from prune_llm.memory import trim_heap
from prune_llm.ranks import ALONE, Ranks
from prune_llm.residence import Residence
from prune_llm.sites import Site, _complete, _observe
from prune_llm.stream_files import Store, StreamFile
from prune_llm.streams import Call, Captured, Stream, hidden_of, same_call, split_call, told
from prune_llm_kernels.wide_products import WideProducts

# on which a block is compared with its fused form
PROBE_TOKENS = 64

Tick = Callable[[int, str], None]


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
        store: where the streams are kept; None: in memory.
        ranks: the processes that share the samples.
        scratch: where the experts of a block lie; None: in memory.
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
        store: Store | None = None,
        ranks: Ranks = ALONE,
        scratch: Path | None = None,
    ) -> None:
        self.dense_target, self.goal = dense_target, goal
        self.architecture, self.checkpoint = architecture, checkpoint
        self.device, self.dtype = device, dtype
        self._select, self._tick = select, tick
        own_ST = ranks.share(samples_ST) if samples_ST is not None else None
        self._batches = list(own_ST.split(batch_size)) if own_ST is not None else []
        self.ranks, self.batches = ranks, sum(ranks.of_all(len(self._batches)))
        self._site_names: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        self.adding: dict[tuple[str, ...], bool] = {}  # see `sites.stages_of`
        self._agrees: dict[str, bool] = {}  # by the block's modules
        self.fused: set[int] = set()  # blocks that run with our kernels around their linears
        self.store = store or Store()
        self.residence = Residence(architecture, checkpoint, device, dtype, scratch)
        self.first = 0  # of the blocks that are walked
        self.stream: Stream | None = None
        self.dense: Stream | None = None
        self.final: Stream | None = None
        self._rest: tuple[Any, ...] | None = None  # what blocks return behind the hidden states

    def __iter__(self) -> Iterator[Block]:
        if self._batches and self.first < len(self.architecture.blocks):
            self._begin()
        try:
            for index in range(self.first, len(self.architecture.blocks)):
                block = self._resident(index)
                yield block
                block.pass_on()
        finally:
            self.residence.stop()

    def _resident(self, index: int) -> Block:
        """The block in memory; where the walk reads ahead, the next one is begun."""
        self.residence.load(index)
        self.residence.read_ahead(index + 1)
        if self.stream is not None:
            self._choose(index, self.stream)
        linears = self._select(self.architecture.linears(index))
        return Block(self, index, linears, self.stream, self.dense)

    def _begin(self) -> None:
        """The streams before the first block, and how blocks are called."""
        if self.stream is None:
            self.stream = self._start()
            if self.dense_target or self.goal == "block":
                self.dense = self.stream.copy("dense")
        else:
            self._learn_calls(self.stream)
        if self.goal == "logits":
            if self.final is None:
                self.final = self._run_dense(self.stream)
            self.residence.hold_head()
        for stream in self.streams.values():
            stream.calls = self.stream.calls
            stream.journaled = self.store.journaled

    @property
    def streams(self) -> dict[str, Stream]:
        """Those that there are, by name."""
        found = (self.stream, self.dense, self.final)
        return {stream.name: stream for stream in found if stream is not None}

    def drop_streams(self) -> None:
        """Behind the last block nothing is read any more."""
        for stream in self.streams.values():
            stream.drop()

    # -- going on where another walk was stopped ----------------------------------------------

    def decided(self) -> dict[str, Any]:
        """What was found out on one block and is held to on those behind it, for JSON."""
        return {
            "sites": [[kinds, names] for kinds, names in self._site_names.items()],
            "adding": [[kinds, adding] for kinds, adding in self.adding.items()],
            "agrees": self._agrees,
            "fused": sorted(self.fused),
        }

    def resume(self, first: int, decided: dict[str, Any], files: dict[str, StreamFile]) -> None:
        """Begin at block ``first``, with what `decided` told then and the streams' files."""
        self.first = first
        self._site_names = {
            tuple(kinds): [tuple(group) for group in names] for kinds, names in decided["sites"]
        }
        self.adding = {tuple(kinds): adding for kinds, adding in decided["adding"]}
        self._agrees, self.fused = decided["agrees"], set(decided["fused"])
        self.stream, self.dense = (self._resumed(n, first, files) for n in ("pruned", "dense"))
        self.final = self._resumed("final", len(self.architecture.blocks), files)

    def _resumed(self, name: str, generation: int, files: dict[str, StreamFile]) -> Stream | None:
        if name not in files:
            return None
        stream = Stream(name, len(self._batches), self.store)
        stream.restore(files[name], generation)
        return stream

    # -- the stream of hidden states ----------------------------------------------------------

    @torch.no_grad()
    def _start(self) -> Stream:
        """Run the embeddings on every batch, and record how the model calls its blocks."""
        stream = Stream("pruned", len(self._batches), self.store)
        with self.residence.outside():
            for number, batch in enumerate(self._batches):
                stream.replace(number, self._embed(batch))
            self.residence.load(0)
            self._record_calls(stream)
        trim_heap()
        return stream

    @torch.no_grad()
    def _learn_calls(self, stream: Stream) -> None:
        """As `_start`, for a stream that is there already."""
        with self.residence.outside():
            self.residence.load(0)
            self._record_calls(stream)
        if self.first > 0:
            self.residence.release(0)
        trim_heap()

    def _record_calls(self, stream: Stream) -> None:
        """For each batch size; block 0 is in memory."""
        batches = list(self._batches)
        if self.goal != "none":
            batches.append(self._batches[0][:1])
        for batch in batches:
            if len(batch) not in stream.calls:
                stream.calls[len(batch)] = self._record(batch, self._embed(batch))

    def _embed(self, ids_ST: Tensor) -> Tensor:
        """The input of block 0 [S, T, D] on the CPU."""
        hidden_STD, _ = self._first_call(ids_ST)
        return hidden_STD.cpu()

    def _first_call(self, ids_ST: Tensor) -> tuple[Tensor, Call]:
        seen: list[tuple[Tensor, Call]] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            seen.append(split_call(args, kwargs))
            raise Captured

        self._run_base(ids_ST, [catch])
        return seen[0]

    def _record(self, ids_ST: Tensor, hidden_STD: Tensor) -> list[Call]:
        """How every block is called for a batch of this size, from a run that computes nothing.

        Raises:
            ValueError: what a block receives beside the hidden states depends on the tokens.
        """
        _, first = self._first_call(ids_ST)
        with told(self.architecture.block_name(0)), WideProducts(), FastAttention():
            answer = first.run(self.architecture.blocks[0], hidden_STD.to(self.device))
        self._rest = answer[1:] if isinstance(answer, tuple) else None
        calls = self._pass_through(ids_ST)
        again = self._pass_through(ids_ST.flip(1))
        for index, (one, other) in enumerate(zip(calls, again, strict=True)):
            if not same_call(one, other):
                raise ValueError(
                    f"{self.architecture.block_name(index)}: is given more than the hidden states "
                    "of each token; this architecture is not supported"
                )
        return calls

    def _pass_through(self, ids_ST: Tensor) -> list[Call]:
        calls: list[Call] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            hidden_STD, call = split_call(args, kwargs)
            calls.append(call)
            return hidden_STD if self._rest is None else (hidden_STD, *self._rest)

        self._run_base(ids_ST, [note] * len(self.architecture.blocks))
        return calls

    def _run_base(self, ids_ST: Tensor, forwards: list[Callable[..., Any]]) -> None:
        """Run the base model with the forward of its first blocks replaced."""
        with suppress(Captured):
            self._run_model(self.architecture.model.base_model, ids_ST, forwards)

    def _run_model(self, model: Any, ids_ST: Tensor, forwards: list[Callable[..., Any]]) -> Any:
        blocks = list(self.architecture.blocks)[: len(forwards)]
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        try:
            with told(type(model).__name__):
                return model(input_ids=ids_ST.to(self.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward

    @torch.no_grad()
    def _run_dense(self, start: Stream) -> Stream:
        """The dense model's stream behind its last block; only that is journaled."""
        stream, last = start.copy("final"), len(self.architecture.blocks) - 1
        for index in range(len(self.architecture.blocks)):
            self.residence.load(index)
            stream.journaled = self.store.journaled and index == last
            for number, batch in enumerate(stream):
                call = stream.calls[len(batch)][index]
                output = self.run(index, batch.to(self.device, non_blocking=True), call)
                stream.replace(number, hidden_of(output))
            self.residence.release(index)
            self.tick(index, "running the dense model")
        return stream

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
            self._site_names[kinds] = self.ranks.of_first(_observe(linears, run))
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
        with told(self.architecture.block_name(index)), WideProducts():
            if index in self.fused and call.is_plain(hidden_STD):
                return FusedBlock(block)(hidden_STD, call.kwargs["position_embeddings"])
            with FastAttention():
                return call.run(block, hidden_STD)

    def _choose(self, index: int, stream: Stream) -> None:
        """Compare a block with its fused form, once for each sort, on the first tokens."""
        block, hidden_STD = self.architecture.blocks[index], stream[0]
        call, sort = stream.calls[len(hidden_STD)][index], repr(block)
        if not call.is_plain(hidden_STD):
            return
        if sort not in self._agrees:
            cosine, sine = call.kwargs["position_embeddings"]
            angles = cosine[:, :PROBE_TOKENS], sine[:, :PROBE_TOKENS]
            probe_STD = hidden_STD[:1, :PROBE_TOKENS].to(self.device)
            self._agrees[sort] = self.ranks.of_first(agrees(block, probe_STD, angles))
        if self._agrees[sort]:
            self.fused.add(index)

    def tick(self, index: int, phase: str) -> None:
        self._tick(index, phase)
