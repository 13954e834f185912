"""The reconstruction of one block of a run: what is trained, towards what, and what is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from prune_llm.block import Block
from prune_llm.goals import BlockGoal, Goal, LogitsGoal, Runner, in_float32
from prune_llm.reconstruction import CHECKS, DEFAULT_STEPS, Training, default_rate, train
from prune_llm.report import count_nonzero
from prune_llm.tail import Tail

if TYPE_CHECKING:
    from prune_llm.job import Job


def reconstruct_block(job: Job, block: Block, tensors: dict[str, Tensor]) -> None:
    """Train what the solvers left of a block; replaces ``tensors`` and what the modules hold.

    Args:
        tensors: the block's pruned weights by their names on disk, as they will be stored.
    """
    names = {linear: job.architecture.disk_names[linear.weight_name] for linear in block.linears}
    linears = [linear for linear in block.linears if names[linear] in tensors]

    def tick() -> None:
        job.tick(block.index, "reconstructing")

    if not linears:
        for _ in range(CHECKS):
            tick()
        return
    stored = [tensors[names[linear]] for linear in linears]
    with _goal(job, block) as goal, in_float32(block.module):
        for linear, weight in zip(linears, stored, strict=True):
            linear.weight.copy_(weight)  # as stored, which may be more exact than it runs in
        found, result = train(
            block.name,
            [linear.weight for linear in linears],
            [weight.dtype for weight in stored],
            goal,
            training_of(job),
            tick,
        )
    job.reconstruction.append(result)
    for linear, weight in zip(linears, found, strict=True):
        block.assign(linear, weight)
        tensors[names[linear]] = weight.cpu().contiguous()
    job.linears = [
        replace(record, nonzero=count_nonzero(tensors[record.tensor]))
        if record.tensor in tensors
        else record
        for record in job.linears
    ]


@contextmanager
def _goal(job: Job, block: Block) -> Iterator[Goal]:
    """What the run asks for; the block is as it runs, not in float32 yet."""
    if job.config.reconstruction == "block":
        yield BlockGoal(Runner(block), block.dense_outputs())
        return
    tail = Tail(block.walk, block.index)
    try:
        yield LogitsGoal(Runner(block), tail)
    finally:
        tail.close()


def training_of(job: Job) -> Training:
    """The minutes are shared out evenly over the blocks."""
    config, blocks = job.config, len(job.architecture.blocks)
    minutes, steps = config.reconstruction_minutes, config.reconstruction_steps
    rate = config.reconstruction_rate
    return Training(
        steps=DEFAULT_STEPS if minutes is None and steps is None else steps,
        seconds=None if minutes is None else 60 * minutes / blocks,
        rate=default_rate(job.width) if rate is None else rate,
        seed=config.seed,
    )
