"""Which linears of a block read one and the same input, found by running it, and the order in which
they are pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prune_llm.architecture import Linear
from prune_llm.experts import with_index, without_index
from prune_llm.pairing import adds_to_output


@dataclass(frozen=True, eq=False)
class Site:
    """Linears that read one and the same input tensor, in the order they read it."""

    linears: tuple[Linear, ...]

    @property
    def name(self) -> str:
        return ",".join(linear.kind for linear in self.linears)

    @property
    def width(self) -> int:
        """Input features."""
        linear = self.linears[0]
        return int(linear.to_OI(linear.weight).shape[1])


@dataclass(frozen=True)
class Stage:
    """Sites that are pruned together, before those behind them are measured.

    ``silent``: where the output of the stage's one linear is added to the block's hidden states,
    that linear and all linears behind it. With them silent the block returns what it is added to.
    """

    sites: tuple[Site, ...]
    silent: tuple[Linear, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(linear.kind for site in self.sites for linear in site.linears)


def stages_of(
    sites: list[Site], run: Callable[[], Tensor], known: dict[tuple[str, ...], bool]
) -> list[Stage]:
    """In what steps a block is pruned towards the dense model's output, in the order they run.

    Sites of the experts of a block, alike, go together.

    Args:
        run: runs the block, and returns its hidden states; to find out what is added to them.
        known: by the kinds of a stage and all behind it, whether its output is added; filled here,
            as blocks with the same linears are alike.
    """
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        alike = tuple(without_index(linear.kind) for linear in site.linears)
        groups.setdefault(alike, []).append(site)
    stages = [Stage(tuple(group)) for group in groups.values()]
    return [_with_silent(stages[place:], run, known) for place in range(len(stages))] or [Stage(())]


def _with_silent(
    stages: list[Stage], run: Callable[[], Tensor], known: dict[tuple[str, ...], bool]
) -> Stage:
    """The first of these stages; the others come behind it."""
    first = stages[0]
    if len(first.kinds) != 1:
        return first
    linears = tuple(linear for s in stages for site in s.sites for linear in site.linears)
    kinds = tuple(linear.kind for linear in linears)
    if kinds not in known:
        known[kinds] = adds_to_output(linears, run)
    return replace(first, silent=linears) if known[kinds] else first


def within_budget(sites: list[Site], sizes: list[int], budget: int) -> list[tuple[Site, ...]]:
    """Consecutive sites whose sizes add up to the budget at most; a larger one is alone."""
    groups: list[list[Site]] = [[]]
    filled = 0
    for site, size in zip(sites, sizes, strict=True):
        if groups[-1] and filled + size > budget:
            groups.append([])
            filled = 0
        groups[-1].append(site)
        filled += size
    return [tuple(group) for group in groups]


def _complete(grouped: list[tuple[str, ...]], kinds: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Experts that no token reached when the block ran share inputs as those that were reached."""
    seen = {kind for names in grouped for kind in names}
    alike = {without_index(names[0]): names for names in grouped}
    found = list(grouped)
    for kind in kinds:
        names = alike.get(without_index(kind))
        if kind not in seen and names is not None:
            found.append(tuple(with_index(name, kind) for name in names))
            seen.update(found[-1])
    return found


def _observe(linears: list[Linear], run: Callable[[], None]) -> list[tuple[str, ...]]:
    """Run the block and group the kinds of its linears by the identity of what they read."""
    seen: dict[tuple[Any, ...], list[str]] = {}
    alive: list[Tensor] = []  # keeps addresses from being used twice

    def watch(kind: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            alive.append(x)
            key = (x.data_ptr(), x.shape, x.stride(), x._version)
            kinds = seen.setdefault(key, [])
            if kind not in kinds:
                kinds.append(kind)

        return hook

    handles = [linear.module.register_forward_pre_hook(watch(linear.kind)) for linear in linears]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(kinds) for kinds in seen.values()]
