"""One block of a run: calibrated, solved site by site, checked and put on disk."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from prune_llm import architecture as arch
from prune_llm.block import Block
from prune_llm.checkpoint import DTYPES
from prune_llm.dense_target import aimed_at_dense
from prune_llm.expert_tokens import is_expert, method_for, sees_few
from prune_llm.masks import Pattern, Scope, check_keep_mask
from prune_llm.methods import METHODS, Problem, Solution, SolvesTogether
from prune_llm.reconstruct_block import reconstruct_block
from prune_llm.refinement import refined
from prune_llm.report import LinearResult
from prune_llm.saving import Saving
from prune_llm.sites import Site
from prune_llm.solver_copies import TOGETHER_BYTES, together_bytes
from prune_llm.sparse_writer import Part
from prune_llm.statistics import InputStatistics, Needs, all_finite
from prune_llm.windows import needs

if TYPE_CHECKING:
    from prune_llm.job import Job


def prune_block(job: Job, block: Block, directory: Path) -> Future[Part] | None:
    """Calibrate, solve site by site, and put the block's weights on disk; where, if it has any."""
    saving = Saving(job, block, directory)
    trained: dict[str, Tensor] = {}
    for tasks in _together(job, block):
        for linear, disk_name, solved in _solved(job, block, tasks):
            stored = job.ranks.tensor_of_first(solved)
            block.assign(linear, stored)
            if job.config.reconstruction == "none":
                saving.add(disk_name, stored, linear.transposed)
            else:
                trained[disk_name] = stored.cpu()
    if job.config.reconstruction != "none":
        reconstruct_block(job, block, trained)
    turned = {result.tensor for result in job.linears if result.transposed}
    while trained:
        disk_name = next(iter(trained))
        saving.add(disk_name, trained.pop(disk_name), disk_name in turned)
    part = saving.close()
    job.tick(block.index, "pruned")
    return part


@dataclass(frozen=True)
class _Task:
    """One site to be solved.

    Attributes:
        chosen: its method. few: an expert that few tokens reach.
        weights_OI: of its linears, as they are; `problem` may have others to aim at.
    """

    site: Site
    statistics: InputStatistics | None
    chosen: str
    few: bool
    weights_OI: tuple[Tensor, ...]
    problem: Problem

    def is_like(self, other: _Task) -> bool:
        """Whether both can be solved together."""
        shapes = [[tuple(w.shape) for w in task.weights_OI] for task in (self, other)]
        same = self.problem.patterns == other.problem.patterns and self.chosen == other.chosen
        return same and shapes[0] == shapes[1] and not (self.few or other.few)

    @property
    def nbytes(self) -> int:
        """That it takes where several are solved together."""
        return together_bytes(self.site.width, sum(weight.numel() for weight in self.weights_OI))


def _together(job: Job, block: Block) -> Iterator[list[_Task]]:
    """The sites of a block, one by one; on a GPU experts of one shape at once, as many as there is
    room for, not in the order in which they are read."""
    waiting: list[_Task] = []
    for site, statistics in block.statistics(needs(job.config)):
        task = _task(job, block, site, statistics)
        one_of_many = job.solves_together and is_expert(site.linears[0].kind)
        if not (one_of_many and isinstance(METHODS[task.chosen], SolvesTogether)):
            yield [task]
            continue
        if sum(other.nbytes for other in waiting) + task.nbytes > TOGETHER_BYTES:
            yield from _alike(waiting)
            waiting = []
        waiting.append(task)
    yield from _alike(waiting)


def _alike(tasks: list[_Task]) -> list[list[_Task]]:
    """In groups that can be solved together."""
    groups: list[list[_Task]] = []
    for task in tasks:
        group = next((group for group in groups if task.is_like(group[0])), None)
        if group is None:
            groups.append([task])
        else:
            group.append(task)
    return groups


def _task(job: Job, block: Block, site: Site, statistics: InputStatistics | None) -> _Task:
    name, few = f"{block.name}.{site.name}", sees_few(site, statistics)
    if not few:
        _warn_rank(job, name, statistics, needs(job.config))
    weights = tuple(block.weight_OI(linear) for linear in site.linears)
    patterns = tuple(job.plan.patterns[linear.name] for linear in site.linears)
    _check_finite(site.linears, weights)
    aimed = weights if few else _aimed(job, name, weights, statistics)
    problem = _problem(job, block, site, aimed, patterns, statistics)
    chosen = method_for(job.config.method, site, statistics)
    return _Task(site, statistics, chosen, few, weights, problem)


def _solved(
    job: Job, block: Block, tasks: list[_Task]
) -> Iterator[tuple[arch.Linear, str, Tensor]]:
    """Each linear of the sites with its name on disk and its pruned weight as stored there.

    The block is left as it is; what is to be told goes into the job's results and warnings.
    """
    started = time.perf_counter()
    method = METHODS[tasks[0].chosen]
    if len(tasks) > 1:
        assert isinstance(method, SolvesTogether)
        found = method.solve_together([task.problem for task in tasks])
    else:
        found = [method.solve(tasks[0].problem)]
    refine = job.config.refine
    for place, task in enumerate(tasks):
        if refine != "none" and task.statistics is not None and not task.few:
            found[place] = refined(task.problem, found[place], refine)
    weights = sum(weight.numel() for task in tasks for weight in task.weights_OI)
    share = (time.perf_counter() - started) / weights
    for task, solutions in zip(tasks, found, strict=True):
        for linear, weight_OI, solution in zip(
            task.site.linears, task.weights_OI, solutions, strict=True
        ):
            yield _noted(job, block, task, linear, weight_OI, solution, share)


def _noted(
    job: Job,
    block: Block,
    task: _Task,
    linear: arch.Linear,
    weight_OI: Tensor,
    solution: Solution,
    share: float,
) -> tuple[arch.Linear, str, Tensor]:
    """Check a solution and put it into the results. ``share``: seconds for each weight."""
    pattern, statistics = job.plan.patterns[linear.name], task.statistics
    _check_counts(linear, solution, pattern, METHODS[task.chosen].scope)
    disk_name = job.architecture.disk_names[linear.weight_name]
    stored = _stored(job, linear, disk_name, solution)
    error = statistics.relative_error(weight_OI, solution.weight_OI) if statistics else None
    job.linears.append(
        LinearResult.of(
            linear,
            disk_name,
            block.index,
            pattern,
            solution,
            stored,
            error=error,
            seconds=share * weight_OI.numel(),
            method=task.chosen,
            tokens=None if statistics is None else statistics.tokens,
        )
    )
    job.warnings += [f"{linear.name}: {note}" for note in solution.notes]
    return linear, disk_name, stored


def solve_site(
    job: Job, block: Block, site: Site, statistics: InputStatistics | None
) -> Iterator[tuple[arch.Linear, str, Tensor]]:
    """Each linear of a site with its name on disk and its pruned weight as stored there."""
    yield from _solved(job, block, [_task(job, block, site, statistics)])


def _problem(
    job: Job,
    block: Block,
    site: Site,
    weights: tuple[Tensor, ...],
    patterns: tuple[Pattern, ...],
    statistics: InputStatistics | None,
) -> Problem:
    seed = zlib.crc32(f"{job.config.seed} {block.name}.{site.name}".encode())
    config = job.config
    return Problem(weights, patterns, statistics, config.damping, config.column_block, seed)


def _aimed(
    job: Job, name: str, weights: tuple[Tensor, ...], statistics: InputStatistics | None
) -> tuple[Tensor, ...]:
    """The weights to prune: as they are, or re-solved for the dense model's output."""
    if job.config.target == "pruned" or statistics is None or statistics.tokens == 0:
        return weights
    if statistics.paired == 0:
        job.warnings.append(
            f"{name}: none of its tokens are known in the dense model; target pruned instead"
        )
        return weights
    if statistics.paired < statistics.tokens:
        job.partly_paired.append((statistics.paired, statistics.tokens))
    aimed, notes = aimed_at_dense(weights, statistics, job.config.damping)
    job.warnings += [f"{name}: {note}" for note in notes]
    return aimed


def _warn_rank(job: Job, name: str, statistics: InputStatistics | None, needs: Needs) -> None:
    if statistics is None or statistics.tokens == 0 or Needs.GRAM not in needs:
        return
    width = len(statistics.square_sum_I)
    if statistics.tokens < width:
        job.warnings.append(
            f"{name}: {statistics.tokens} calibration tokens for {width} input features, so the "
            "Gram matrix is rank-deficient and only damping makes it solvable; give more samples"
        )


def _check_finite(linears: tuple[arch.Linear, ...], weights: tuple[Tensor, ...]) -> None:
    for linear, weight_OI in zip(linears, weights, strict=True):
        if not all_finite(weight_OI):
            raise ValueError(f"{linear.weight_name}: holds NaN or infinite weights")


def _check_counts(
    linear: arch.Linear, solution: Solution, pattern: Pattern, scope: Scope | None
) -> None:
    """A method that prunes one weight too many or too few is a fault of ours."""
    problem = check_keep_mask(solution.keep_OI, pattern, scope or "matrix")
    if problem is not None:
        raise AssertionError(f"{linear.weight_name}: {problem}")


def _stored(job: Job, linear: arch.Linear, disk_name: str, solution: Solution) -> Tensor:
    """The pruned weight as it goes to disk: original dtype and orientation, no -0.0."""
    dtype = DTYPES[job.checkpoint.tensor(disk_name).dtype]
    stored = linear.from_OI(solution.weight_OI).to(dtype).contiguous()
    stored = stored + 0.0  # -0.0 + 0.0 is +0.0
    if not all_finite(stored):
        raise ValueError(f"{linear.weight_name}: its updated weights overflow {dtype}")
    return stored
