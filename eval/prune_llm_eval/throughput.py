"""How fast a model answers: prompts and tokens at several batch sizes and contexts, beside dense.

Everything runs as the server runs it (`prune_llm.runners`), without HTTP and scheduling: prompts in
chunks, then one token for every sequence at once. All variants take turns in every round, forwards
and backwards, and so does a read of a large buffer, the bandwidth of the memory. CPU only.

Shape letters: B = sequences, T = tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm.activation.levels import DENSE
from prune_llm.decoder import recordable
from prune_llm.parts import read_parts
from prune_llm.runners import new_runner, token_bytes
from prune_llm.segments import BatchLimits, Runner, Segment
from prune_llm_eval.clock import seconds_of
from prune_llm_eval.decode_speed import step_bytes, time_transformers
from prune_llm_eval.speed import OnProgress
from prune_llm_kernels import cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE = 32
# a variant that has no level and runs through transformers' own generate
GENERATE = "generate"


@dataclass(frozen=True)
class Load:
    """What a variant is given: ``batch`` prompts of ``context`` tokens."""

    context: int
    batch: int


@dataclass(frozen=True)
class ThroughputConfig:
    """What is timed.

    Attributes:
        contexts: prompt lengths; (): 16, 128 and 512, as far as the model's context has room.
        batches: sequences that run at once.
        tokens: each gets.
        rounds: in which everything takes its turn.
        threads: None: as many as torch uses.
        grid: every context at every batch size, not only the first of each with all of the other.
    """

    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 4, 16)
    tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    grid: bool = False

    def __post_init__(self) -> None:
        if not self.batches:
            raise ValueError("batches: give at least one, such as 1")
        for name in ("contexts", "batches"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} {value}: must be at least 1")
        if self.tokens < 2:
            raise ValueError(f"tokens {self.tokens}: must be at least 2, the first is the prompt's")
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")

    def loads(self, contexts: Sequence[int]) -> list[Load]:
        """Sorted, none twice."""
        first_context, first_batch = min(contexts), min(self.batches)
        return [
            Load(context, batch)
            for context in sorted(set(contexts))
            for batch in sorted(set(self.batches))
            if self.grid or context == first_context or batch == first_batch
        ]


@dataclass(frozen=True)
class Variant:
    """What takes its turn: a loaded model at a level, or at `GENERATE` its own generate()."""

    name: str
    model: PreTrainedModel
    level: str = DENSE


@dataclass(frozen=True)
class Timing:
    """One variant under one load.

    Attributes:
        first: seconds until every sequence has its first token, by round.
        step: seconds in which every sequence gets one more, mean of a round's steps, by round.
        active: share of the inputs that counted at a level; None where nothing is skipped.
        step_bytes: of weights, keys and values that a step must read; None where it is not known.
    """

    variant: str
    load: Load
    first: tuple[float, ...]
    step: tuple[float, ...]
    active: float | None
    step_bytes: int | None


@dataclass(frozen=True)
class Throughput:
    """All timings; ``bandwidth``: bytes per second that memory delivered, by load and round."""

    engines: dict[str, str]
    timings: list[Timing]
    bandwidth: dict[Load, tuple[float, ...]]


def measure_throughput(
    variants: Sequence[Variant],
    loads: Sequence[Load],
    config: ThroughputConfig,
    buffer: Tensor,
    on_progress: OnProgress,
) -> Throughput:
    """Time all variants under all loads.

    Args:
        buffer: read in every round; larger than all caches.

    Raises:
        ValueError: a level that a variant does not have.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        timed = [_timed(variant, loads, config.tokens) for variant in variants]
        engines = {one.variant.name: one.engine for one in timed}
        found = Throughput(engines, [], {})
        for place, load in enumerate(loads):
            what = f"timing context {load.context}, batch {load.batch}"
            on_progress(what, place, len(loads))
            timings, bandwidth = _take_turns(timed, load, config, buffer)
            found.timings.extend(timings)
            found.bandwidth[load] = bandwidth
    finally:
        torch.set_num_threads(before)
    return found


@dataclass(frozen=True)
class _Timed:
    """A variant, and how to run it."""

    variant: Variant
    runner: Runner | None
    tokens: int

    @property
    def engine(self) -> str:
        return "transformers generate" if self.runner is None else self.runner.name

    def run(self, load: Load) -> tuple[float, float, float | None]:
        """Seconds to the first tokens and of a step, and the active share."""
        prompts = random_prompts(self.variant.model, load)
        if self.runner is None:
            first, per_second = time_transformers(self.variant.model, prompts, self.tokens)
            return first, 1 / per_second, None
        return time_runner(self.runner, prompts, self.tokens, self.variant.level)

    def step_bytes(self, load: Load, active: float | None) -> int | None:
        """None for what transformers runs, and for levels of several rows: they share channels."""
        known = self.runner is not None and recordable(self.variant.model) is None
        if not known or (active is not None and load.batch > 1):
            return None
        context = load.context + self.tokens // 2
        active = 1.0 if active is None else active
        return step_bytes(read_parts(self.variant.model), context, load.batch, active)


def _timed(variant: Variant, loads: Sequence[Load], tokens: int) -> _Timed:
    if variant.level == GENERATE:
        return _Timed(variant, None, tokens)
    pages = max(load.batch * -(-(load.context + tokens) // PAGE) for load in loads)
    limits = BatchLimits(
        max_rows=max(load.batch for load in loads),
        cache_bytes=max(2, pages) * PAGE * token_bytes(variant.model),
        page_size=PAGE,
        levels=variant.level != DENSE,
    )
    runner = new_runner(variant.model, limits)
    if variant.level not in runner.levels:
        raise ValueError(
            f"level {variant.level!r}: does not exist; this model has {', '.join(runner.levels)}"
        )
    return _Timed(variant, runner, tokens)


def _take_turns(
    timed: Sequence[_Timed], load: Load, config: ThroughputConfig, buffer: Tensor
) -> tuple[list[Timing], tuple[float, ...]]:
    """A round that warms up, then those that count."""
    found: list[list[tuple[float, float, float | None]]] = [[] for _ in timed]
    reads: list[float] = []
    for round_ in range(config.rounds + 1):
        order = range(len(timed))
        for place in order if round_ % 2 == 0 else reversed(order):
            found[place].append(timed[place].run(load))
        reads.append(seconds_of(partial(cpu.read_all, buffer)))
    timings = []
    for one, runs in zip(timed, found, strict=True):
        first, step, shares = zip(*runs[1:], strict=True)
        known = [share for share in shares if share is not None]
        active = statistics.fmean(known) if known else None
        nbytes = one.step_bytes(load, active)
        timings.append(Timing(one.variant.name, load, first, step, active, nbytes))
    return timings, tuple(buffer.nbytes / read for read in reads[1:])


def random_prompts(model: PreTrainedModel, load: Load) -> list[list[int]]:
    """The same for every variant."""
    generator = torch.Generator().manual_seed(load.context)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    size = load.batch, load.context
    prompts: list[list[int]] = torch.randint(vocabulary, size, generator=generator).tolist()
    return prompts


def time_runner(
    runner: Runner, prompts: Sequence[Sequence[int]], tokens: int, level: str
) -> tuple[float, float, float | None]:
    """Seconds until all have their first token and of each further step; the active share.

    Greedy, with as many sequences as prompts; each gets ``tokens`` tokens.
    """
    span = -(-(len(prompts[0]) + tokens) // runner.limits.page_size)
    pages = [range(slot * span, (slot + 1) * span) for slot in range(len(prompts))]
    latest = [0] * len(prompts)
    shares = []
    started = time.perf_counter()
    for chunk in _chunks(prompts, pages, runner):
        ran = runner.run(chunk)
        ends = [segment.slot for segment in chunk if segment.wanted]
        for slot, token in zip(ends, _greedy(ran.logits_WV), strict=True):
            latest[slot] = token
    first = time.perf_counter()
    for place in range(len(prompts[0]), len(prompts[0]) + tokens - 1):
        rows = [
            Segment(slot, place, (token,), level, 1, pages[slot])
            for slot, token in enumerate(latest)
        ]
        ran = runner.run(rows)
        latest = _greedy(ran.logits_WV)
        shares += [share for share in ran.active if share is not None]
    ended = time.perf_counter()
    for slot in range(len(prompts)):
        runner.leave(slot)
    active = statistics.fmean(shares) if shares else None
    return first - started, (ended - first) / (tokens - 1), active


def _greedy(logits_WV: Tensor) -> list[int]:
    if not len(logits_WV):
        return []
    chosen: list[int] = logits_WV.max(-1).indices.tolist()
    return chosen


def _chunks(
    prompts: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], runner: Runner
) -> Iterator[list[Segment]]:
    """All prompts in runs of as many rows as the runner takes, as the scheduler cuts them."""
    most = max(runner.limits.chunk_tokens, runner.piece)
    chunk: list[Segment] = []
    room = most
    for slot, ids in enumerate(prompts):
        start = 0
        while start < len(ids):
            left = len(ids) - start
            take = left if left <= room else room // runner.piece * runner.piece
            if take:
                part = ids[start : start + take]
                wanted = int(take == left)
                chunk.append(Segment(slot, start, part, None, wanted, pages[slot]))
                start, room = start + take, room - take
            if start < len(ids) or not room:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk
