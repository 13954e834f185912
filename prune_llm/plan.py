"""Which pattern each linear of a run gets: the asked one, an allocation's, or its own by --set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm import architecture as arch
from prune_llm.allocation import ALLOCATIONS, Survey, SurveyedSite
from prune_llm.masks import Pattern
from prune_llm.statistics import Needs

if TYPE_CHECKING:
    from prune_llm.config import PruneConfig
    from prune_llm.job import Job


@dataclass(frozen=True)
class Plan:
    """The pattern of each linear by name; ``record`` is what the report says of the allocation."""

    patterns: dict[str, Pattern]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def common(self) -> Pattern | None:
        """The pattern of all; None where they differ."""
        different = set(self.patterns.values())
        return different.pop() if len(different) == 1 else None


def parse_overrides(overrides: tuple[str, ...]) -> list[tuple[str, Pattern]]:
    """ "mlp.down_proj=0.6" or "*.0.*=2:4": which linears, and their pattern."""
    parsed = []
    for text in overrides:
        names, equals, pattern = text.rpartition("=")
        if not equals or not names:
            raise ValueError(f"set {text!r}: must be NAMES=PATTERN, such as mlp.down_proj=0.6")
        try:
            parsed.append((names, Pattern.parse(pattern)))
        except ValueError as error:
            raise ValueError(f"set {text!r}: {error}") from None
    return parsed


def check_allocation(config: PruneConfig) -> None:
    """Raises ValueError for an allocation of N:M and for overrides that cannot be read."""
    if config.allocation != "uniform" and ":" in config.pattern:
        raise ValueError(
            f"allocation {config.allocation!r}: spreads a sparsity, and {config.pattern} is the "
            "same everywhere; give a sparsity, or allocation uniform"
        )
    parse_overrides(config.overrides)


def make_plan(job: Job) -> Plan:
    """Look at the dense model as the allocation asks, and divide the budget.

    The budget is the asked sparsity of the linears that no override names.

    Raises:
        ValueError: an override that matches no linear.
    """
    blocks = range(len(job.architecture.blocks))
    linears = [
        linear
        for index in blocks
        for linear in arch.select(job.architecture.linears(index), job.config.ignore)
    ]
    asked = Pattern.parse(job.config.pattern)
    own = _overridden(linears, parse_overrides(job.config.overrides))
    patterns = {linear.name: own.get(linear.name, asked) for linear in linears}
    allocation = ALLOCATIONS[job.config.allocation]
    free = [linear for linear in linears if linear.name not in own]
    if allocation is None or not free:
        return Plan(patterns, {"name": job.config.allocation} if linears else {})
    started = time.perf_counter()
    survey = _survey(job, free, asked.sparsity)
    counts = allocation.counts(survey)
    assert sum(counts.values()) == survey.budget and counts.keys() == survey.sizes.keys()
    patterns |= {name: Pattern(count / survey.sizes[name]) for name, count in counts.items()}
    record = {
        "name": job.config.allocation,
        "weights": sum(survey.sizes.values()),
        "pruned": survey.budget,
        "lowest": min(patterns[name].sparsity for name in counts),
        "highest": max(patterns[name].sparsity for name in counts),
        "seconds": time.perf_counter() - started,
        **survey.record,
    }
    return Plan(patterns, record)


def _overridden(
    linears: list[arch.Linear], overrides: list[tuple[str, Pattern]]
) -> dict[str, Pattern]:
    """The last override that matches a linear counts."""
    found: dict[str, Pattern] = {}
    for names, pattern in overrides:
        matching = [linear.name for linear in linears if arch.matches(linear, names)]
        if not matching:
            raise ValueError(
                f"set {names!r}: matches no linear that is pruned; their names look like "
                f"{linears[0].name if linears else '(none)'}"
            )
        found |= dict.fromkeys(matching, pattern)
    return found


def _survey(job: Job, linears: list[arch.Linear], sparsity: float) -> Survey:
    stored = {
        linear.name: job.checkpoint.tensor(job.architecture.disk_names[linear.weight_name])
        for linear in linears
    }

    def weights() -> Iterator[tuple[str, Tensor]]:
        for linear in linears:
            weight = stored[linear.name].read().to(job.device, torch.float32)
            yield linear.name, linear.to_OI(weight)

    def blocks(needs: Needs) -> Iterator[list[SurveyedSite]]:
        for block in job.walk(survey=True):
            sites = []
            for site, statistics in block.collect(needs).items():
                chosen = [linear for linear in site.linears if linear.name in stored]
                assert statistics is not None, "an allocation that needs data was given none"
                if chosen:
                    names = tuple(linear.name for linear in chosen)
                    weights_OI = tuple(block.weight_OI(linear) for linear in chosen)
                    changes = tuple(partial(block.output_change, linear) for linear in chosen)
                    sites.append(SurveyedSite(names, weights_OI, statistics, changes))
            if sites:
                yield sites

    return Survey(
        sizes={name: tensor.shape[0] * tensor.shape[1] for name, tensor in stored.items()},
        sparsity=sparsity,
        method=job.config.method,
        damping=job.config.damping,
        column_block=job.config.column_block,
        weights=weights,
        blocks=blocks,
    )
