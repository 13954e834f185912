"""The largest unstructured sparsity that keeps a target in quality: pruned, measured, pruned again.

Every try is a whole run of `prune`, because what an earlier block loses decides what a later one
can. The text is read, and the dense model measured, once; the best try so far is kept on disk and
is the result.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_llm.activation.sparsify import SparsifyConfig
from prune_llm.checkpoint import REPORT_FILE, locate, open_checkpoint
from prune_llm.commits import Commits, without_unread
from prune_llm.config import PruneConfig
from prune_llm.durability import sync_directory, sync_tree
from prune_llm.job import OnNote, OnProgress, Progress
from prune_llm.journal import TRY, Journal, Record, Settings, check_settings
from prune_llm.memory import return_freed_memory
from prune_llm.prune import (
    CHECKPOINT,
    add_pruned_levels,
    finish,
    levels_of,
    prune_into,
    settings_of,
    tell_found,
)
from prune_llm.quality import (
    batches,
    check_max_ppl_increase,
    load_to_measure,
    mean_nll,
    ppl_increase,
)
from prune_llm.report import PruneReport
from prune_llm.staging import Staging
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
    resume: bool = False,
    restart: bool = False,
    on_note: OnNote | None = None,
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
        resume, restart, on_note: as `prune` takes them. A stopped search goes on behind the last
            sparsity tried, and behind the last block of the one that was being tried.

    Raises:
        ValueError: as `prune` does, or the target cannot be met; the message says what can.
    """
    check_max_ppl_increase("max_ppl_increase", max_ppl_increase)
    config = config or PruneConfig.of_quality()
    levels = None if levels is None else levels_of(config, levels)
    with Staging(Path(output), resume, restart) as staging:
        tell = on_note or (lambda _: None)
        tell_found(staging, resume, tell)
        others, held_out = (levels.samples, levels.held_out) if levels else (None, None)
        windows = draw_windows(model, config, others, held_out)
        own = settings_of(levels, windows)
        search = _Search(staging, locate(model), config, windows, own, on_progress, on_try)
        search.on_note = tell
        report = search.run(max_ppl_increase)
        directory = staging.directory / CHECKPOINT
        _copy(search.kept, directory)
        if levels is not None:
            add_pruned_levels(directory, levels, windows.apart, report, on_progress)
        finish(staging, report, search.seconds, directory)
    return report


def _copy(source: Path, directory: Path) -> None:
    """The weights by a second name where the file system can, so that they take no room."""
    directory.mkdir()
    for file in source.iterdir():
        try:
            if file.suffix != ".safetensors":
                raise OSError(errno.ENOTSUP, "must not change with its copy")
            os.link(file, directory / file.name)
        except OSError:
            shutil.copyfile(file, directory / file.name)


class _Search:
    """What was tried so far; ``kept`` is the directory of the largest sparsity allowed.

    The journal has a record of each sparsity tried, written when what it left is in its place.
    """

    def __init__(
        self,
        staging: Staging,
        model: Path,
        config: PruneConfig,
        windows: Windows,
        settings: Settings,
        on_progress: OnProgress | None,
        on_try: OnTry | None,
    ) -> None:
        self.staging, self.directory, self.model = staging, staging.directory, model
        self.config, self.windows, self.settings = config, windows, settings
        self.on_progress, self.on_try = on_progress, on_try
        self.on_note: OnNote = lambda _: None
        self.journal = Journal(self.directory)
        self.tried: dict[int, float] = {}
        self.step = ""
        self._before, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Spent, by stopped runs too."""
        return self._before + time.perf_counter() - self._started

    @property
    def found(self) -> int | None:
        """The largest sparsity allowed so far, in percent."""
        records = self.journal.of_kind("try")
        return max((r["percent"] for r in records if r["increase"] <= self.allowed), default=None)

    @property
    def kept(self) -> Path:
        return self.directory / f"kept-{self.found}"

    def run(self, allowed: float) -> PruneReport:
        """Leaves the pruned model in ``kept`` and returns its report."""
        self.allowed = allowed
        self._begin()
        texts = {"search": self.windows.search_ST, "held_out": self.windows.report_ST}
        dense = self._dense(texts)
        for record in self.journal.of_kind("try"):
            self._note(record)
        while (percent := next_try(self.tried, allowed)) is not None:
            self._try(percent, dense["search"])
        if self.found is None:
            least = self.tried[LEAST]
            raise ValueError(
                f"max_ppl_increase {allowed:.4g}: cannot be met, a sparsity of {LEAST}% already "
                f"costs {least:.2%} on the search windows; allow at least {1.05 * least:.2%}"
            )
        self.step = "found"
        report = PruneReport.load(self.kept / REPORT_FILE)
        held_out = self._measure(self.kept, {"held_out": texts["held_out"]})["held_out"]
        report.search = self._figures(allowed, dense, held_out)
        return report

    def _begin(self) -> None:
        """Take up what a stopped search has tried.

        Raises:
            CannotResume: it was begun with other settings.
        """
        calibration = self.windows.pruning
        options = without_unread(self.config) | {"max_ppl_increase": self.allowed}
        del options["pattern"]
        options |= self.settings.get("options", {})
        inputs = {
            "the model": open_checkpoint(self.model).sha256(),
            "the calibration text": None if calibration is None else calibration.sha256,
            "the text beside it": self.windows.apart_sha256,
        }
        settings = {"options": options, "inputs": inputs}
        if self.journal.records:
            check_settings(str(self.directory), self.journal.records[0], settings)
        else:
            self.journal.append({"kind": "settings", **settings})
        self.staging.taken = True
        latest = [r["seconds"] for r in self.journal.records if "seconds" in r]
        self._before = latest[-1] if latest else 0.0
        tried = {f"{TRY}{record['percent']}" for record in self.journal.of_kind("try")}
        for path in self.directory.iterdir():
            trying = path.name.startswith(TRY) and path.name not in tried
            if path.is_dir() and not trying and path != self.kept:
                shutil.rmtree(path)

    def _dense(self, texts: dict[str, Tensor]) -> dict[str, float]:
        """The dense model's negative log likelihoods."""
        for record in self.journal.of_kind("dense"):
            return {text: float(record["nll"][text]) for text in texts}
        nll = self._measure(self.model, texts)
        self.journal.append({"kind": "dense", "nll": nll, "seconds": self.seconds})
        return nll

    def _try(self, percent: int, dense_nll: float) -> None:
        """Prune and measure; what is allowed, the largest so far, is kept."""
        self.step = f"try {len(self.tried) + 1}: {percent}%"
        config = replace(self.config, pattern=f"{percent / 100:.2f}")
        before = self.kept
        work = self.directory / f"{TRY}{percent}"
        pruned = work / CHECKPOINT
        tell = self.on_note if not self.tried else (lambda _: None)
        with Commits(work, self.staging, tell=tell, whole=True) as commits:
            windows = self.windows.pruning
            report = prune_into(pruned, self.model, config, self._tell, windows, commits)
            report.save(pruned / REPORT_FILE)
            nll = self._measure(pruned, {"search": self.windows.search_ST})["search"]
        increase = ppl_increase(nll, dense_nll)
        if increase <= self.allowed:
            sync_tree(pruned)
            pruned.rename(self.directory / f"kept-{percent}")
            sync_directory(self.directory)
        record = {"percent": percent, "increase": increase, "seconds": self.seconds}
        self.journal.append({"kind": "try", **record})
        self._note(record)
        shutil.rmtree(work)
        if before != self.kept:
            shutil.rmtree(before, ignore_errors=True)

    def _note(self, record: Record) -> None:
        """A sparsity that was tried, now or before a stop."""
        self.tried[record["percent"]] = record["increase"]
        if self.on_try is not None:
            self.on_try(Try(record["percent"] / 100, record["increase"]))

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
        found = self.found
        assert found is not None
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
