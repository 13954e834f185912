"""The largest unstructured sparsity that keeps a target in quality: pruned, measured, pruned again.

Every try is a whole run of `prune`, because what an earlier block loses decides what a later one
can. The text is read, and the dense model measured, once; the best try so far is kept on disk and
is the result.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_llm.activation.sparsify import SparsifyConfig
from prune_llm.checkpoint import Staging, locate
from prune_llm.config import PruneConfig
from prune_llm.job import OnProgress, Progress
from prune_llm.memory import return_freed_memory
from prune_llm.prune import add_pruned_levels, finish, levels_of, prune_into
from prune_llm.quality import (
    batches,
    check_max_ppl_increase,
    load_to_measure,
    mean_nll,
    ppl_increase,
)
from prune_llm.report import PruneReport
from prune_llm.windows import Windows, draw_windows

# sparsities are tried in whole percent, from the first one on
FIRST, LEAST, MOST = 50, 1, 95
# how the increase grows with the sparsity, for a guess from one try: about its cube
POWER = 3
# so many tries are guessed, those after them halve what is left
GUESSES = 6


@dataclass(frozen=True)
class Try:
    """A sparsity and what it costs on the search windows, both as fractions."""

    sparsity: float
    ppl_increase: float


OnTry = Callable[[Try], None]


def next_try(tried: Mapping[int, float], allowed: float) -> int | None:
    """The sparsity in percent to try next; None: the largest that is allowed is known.

    Args:
        tried: increase in perplexity by percent, taken to grow with it.
    """
    low = max((p for p, increase in tried.items() if increase <= allowed), default=LEAST - 1)
    high = min((p for p, increase in tried.items() if not increase <= allowed), default=MOST + 1)
    if high - low <= 1:
        return None
    if not tried:
        return FIRST
    guess = (low + high) // 2 if len(tried) > GUESSES else _guess(tried, low, high, allowed)
    return min(max(guess, low + 1), high - 1)


def _guess(tried: Mapping[int, float], low: int, high: int, allowed: float) -> int:
    """Where the increase, a power of the sparsity, reaches what is allowed."""
    known = [p for p in (low, high) if tried.get(p, 0.0) > 0 and math.isfinite(tried[p])]
    if not known:
        return (low + high) // 2
    near = known[0]
    power = float(POWER)
    if len(known) == 2 and tried[high] > tried[low]:
        power = math.log(tried[high] / tried[low]) / math.log(high / low)
    factor: float = (allowed / tried[near]) ** (1 / power)
    return math.floor(near * factor)


def prune_within(
    model: str | os.PathLike[str],
    max_ppl_increase: float,
    config: PruneConfig | None = None,
    output: str | os.PathLike[str] = "pruned",
    *,
    levels: SparsifyConfig | None = None,
    on_progress: OnProgress | None = None,
    on_try: OnTry | None = None,
) -> PruneReport:
    """Prune ``model`` as far as its perplexity grows by at most ``max_ppl_increase``.

    The sparsity is found on windows of the calibration text that pruning does not see, and what it
    costs is reported on windows that neither saw (`PruneReport.search`). The same input gives the
    same output. To measure it, the whole model is loaded.

    Args:
        max_ppl_increase: over the dense model, as a fraction: 0.05 is 5 %.
        config: its pattern is not read; None: `PruneConfig.of_quality`.
        levels: activation levels for the result, as `prune` takes them.
        on_try: told of every sparsity tried.

    Raises:
        ValueError: as `prune` does, or the target cannot be met; the message says what can.
    """
    check_max_ppl_increase("max_ppl_increase", max_ppl_increase)
    config = config or PruneConfig.of_quality()
    started = time.perf_counter()
    levels = None if levels is None else levels_of(config, levels)
    with Staging(Path(output)) as staging:
        others, held_out = (levels.samples, levels.held_out) if levels else (None, None)
        windows = draw_windows(model, config, others, held_out)
        search = _Search(staging.directory, locate(model), config, windows, on_progress, on_try)
        report = search.run(max_ppl_increase)
        if levels is not None:
            add_pruned_levels(search.kept, levels, windows.apart, report, on_progress)
        finish(staging, report, time.perf_counter() - started, search.kept)
    return report


@dataclass
class _Search:
    """What was tried so far; ``kept`` is the directory of the largest sparsity allowed."""

    directory: Path
    model: Path
    config: PruneConfig
    windows: Windows
    on_progress: OnProgress | None
    on_try: OnTry | None
    tried: dict[int, float] = field(default_factory=dict)
    step: str = ""

    @property
    def kept(self) -> Path:
        return self.directory / "kept"

    def run(self, allowed: float) -> PruneReport:
        """Leaves the pruned model in ``kept`` and returns its report."""
        texts = {"search": self.windows.search_ST, "held_out": self.windows.report_ST}
        dense = self._measure(self.model, texts)
        report: PruneReport | None = None
        while (percent := next_try(self.tried, allowed)) is not None:
            report = self._try(percent, dense["search"], allowed) or report
        if report is None:
            least = self.tried[LEAST]
            raise ValueError(
                f"max_ppl_increase {allowed:.4g}: cannot be met, a sparsity of {LEAST}% already "
                f"costs {least:.2%} on the search windows; allow at least {1.05 * least:.2%}"
            )
        self.step = "found"
        held_out = self._measure(self.kept, {"held_out": texts["held_out"]})["held_out"]
        report.search = self._figures(allowed, dense, held_out)
        return report

    def _try(self, percent: int, dense_nll: float, allowed: float) -> PruneReport | None:
        """Prune and measure. What is allowed is the largest so far, and kept; else None."""
        self.step = f"try {len(self.tried) + 1}: {percent}%"
        directory = self.directory / "try"
        directory.mkdir()
        config = replace(self.config, pattern=f"{percent / 100:.2f}")
        report = prune_into(directory, self.model, config, self._tell, self.windows.pruning)
        nll = self._measure(directory, {"search": self.windows.search_ST})["search"]
        increase = self.tried[percent] = ppl_increase(nll, dense_nll)
        if self.on_try is not None:
            self.on_try(Try(percent / 100, increase))
        if not increase <= allowed:
            shutil.rmtree(directory)
            return None
        shutil.rmtree(self.kept, ignore_errors=True)
        directory.rename(self.kept)
        return report

    def _measure(self, directory: Path, texts: dict[str, Tensor]) -> dict[str, float]:
        """Negative log likelihoods by text."""
        return_freed_memory()
        model = load_to_measure(directory, self.config.device, self.config.dtype)
        total = sum(len(batches(model, windows_ST)) for windows_ST in texts.values())
        ticks = count(1)

        def tick() -> None:
            self._tell(Progress(next(ticks), total, 0, 0, "measuring"))

        return {text: mean_nll(model, windows_ST, tick) for text, windows_ST in texts.items()}

    def _tell(self, progress: Progress) -> None:
        if self.on_progress is not None:
            self.on_progress(replace(progress, step=self.step))

    def _figures(self, allowed: float, dense: dict[str, float], held_out: float) -> dict[str, Any]:
        """What the report says of the search."""
        found = max(percent for percent, increase in self.tried.items() if increase <= allowed)
        return {
            "max_ppl_increase": allowed,
            "sparsity": found / 100,
            "ppl_increase": {
                "search": self.tried[found],
                "held_out": ppl_increase(held_out, dense["held_out"]),
            },
            "dense_ppl": {text: math.exp(min(nll, 100.0)) for text, nll in dense.items()},
            "windows": {
                "search": len(self.windows.search_ST),
                "held_out": len(self.windows.report_ST),
                "seq_len": self.windows.search_ST.shape[1],
            },
            "tries": [
                {"sparsity": percent / 100, "ppl_increase": increase}
                for percent, increase in self.tried.items()
            ],
        }
