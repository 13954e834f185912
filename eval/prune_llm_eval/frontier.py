"""Both sparsities at once: the fastest measured combination that keeps a target in quality.

For each sparsity of the weights the model is pruned, and the activation sparsity is raised until
the two together reach the target. What keeps it is timed: every combination once in each round, in
turns on the CPU, loaded anew, so that only one model is in memory. The checkpoints lie side by side
on disk until the fastest is known.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_llm.activation.copying import copy_weights
from prune_llm.activation.levels import DENSE, LevelTable
from prune_llm.activation.search import TargetNotMet
from prune_llm.activation.sparsify import REPORT_FILE as LEVELS_REPORT_FILE
from prune_llm.activation.sparsify import Progress as LevelProgress
from prune_llm.activation.sparsify import SparsifyConfig, add_levels
from prune_llm.activation.texts import LEAST_WINDOWS
from prune_llm.checkpoint import REPORT_FILE, locate
from prune_llm.config import PruneConfig, select_device
from prune_llm.decoder import new_decoder
from prune_llm.generation import load_tokenizer
from prune_llm.job import Progress
from prune_llm.memory import return_freed_memory
from prune_llm.prune import levels_of, prune_into
from prune_llm.quality import load_to_measure, mean_nll, ppl_increase
from prune_llm.report import environment
from prune_llm.sparse_checkpoint import open_stored
from prune_llm.staging import Staging
from prune_llm.windows import Windows, draw_windows
from prune_llm_eval.speed import OnProgress, check_context, time_plan

FRONTIER_FILE = "frontier.json"
# tokens decoded before the clock runs
WARM_UP = 8


@dataclass(frozen=True)
class FrontierConfig:
    """What is combined and how it is timed.

    Attributes:
        max_ppl_increase: of both sparsities together over the dense model, as a fraction.
        sparsities: of the weights; 0, the dense model, is always among them.
        prune: method, text and seed; its pattern is not read.
        criterion, allocation: of the activation levels, as in `SparsifyConfig`.
        context: tokens of the prompt, from the held-out windows; tokens: decoded behind it.
        rounds: in which every combination takes its turn; medians count.
        threads: None: as many as torch uses.
    """

    max_ppl_increase: float
    sparsities: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6)
    prune: PruneConfig = field(default_factory=PruneConfig)
    criterion: str = "magnitude"
    allocation: str = "greedy"
    granularity: str = "site"
    context: int = 16
    tokens: int = 64
    rounds: int = 5
    threads: int | None = None

    def __post_init__(self) -> None:
        for share in self.sparsities:
            if not 0 <= share < 1:
                raise ValueError(f"sparsities {share:g}: must be in [0, 1), such as 0.4")
            if 0 < share < 0.0001:
                raise ValueError(f"sparsities {share:g}: is next to nothing; give at least 0.0001")
        if self.tokens < 2:
            raise ValueError(f"tokens {self.tokens}: must be at least 2, the first is the prompt's")
        for name in ("context", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        levels_of(self.prune, self.levels)  # raises for what does not go together

    @property
    def levels(self) -> SparsifyConfig:
        """Of one level, on as many windows as pruning has."""
        return SparsifyConfig(
            max_ppl_increase=(self.max_ppl_increase,),
            criterion=self.criterion,
            allocation=self.allocation,
            granularity=self.granularity,
            samples=max(LEAST_WINDOWS, self.prune.samples),
        )


@dataclass(frozen=True)
class Combination:
    """One row.

    Attributes:
        sparsity: asked of the weights; 0: the dense model.
        level: "dense" where no activation is skipped; activation_sparsity: what it realises on the
            held-out windows.
        ppl_increase: over the dense model, by text: "search" and "held_out".
        nbytes: of its tensors on disk.
        feasible: keeps the target on the search windows; what does not is not timed.
        speeds: tokens per second of every round.
    """

    sparsity: float
    level: str
    activation_sparsity: float
    ppl_increase: dict[str, float]
    nbytes: int
    feasible: bool
    speeds: tuple[float, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.speeds)


@dataclass
class FrontierReport:
    """The whole run; saved as frontier.json.

    Attributes:
        untried: sparsities above one that already costs too much.
        chosen: which row is the fastest; its checkpoint is the output.
        decoder: what decoded.
    """

    model: str
    output: str
    config: dict[str, Any]
    environment: dict[str, str]
    text: dict[str, Any]
    dense_ppl: dict[str, float]
    rows: list[Combination] = field(default_factory=list)
    untried: list[float] = field(default_factory=list)
    chosen: int = 0
    decoder: str = ""
    seconds: float = 0.0

    @property
    def dense(self) -> Combination:
        return self.rows[0]

    @property
    def best(self) -> Combination:
        return self.rows[self.chosen]

    @property
    def overlaps(self) -> bool:
        """Whether a round of the dense model was as fast as one of the best combination."""
        return min(self.best.speeds) <= max(self.dense.speeds)

    def to_json(self) -> str:
        found = asdict(self)
        for entry, row in zip(found["rows"], self.rows, strict=True):
            entry["tokens_per_second"] = row.tokens_per_second if row.speeds else None
        return json.dumps(found, indent=1) + "\n"


OnCombination = Callable[[Combination], None]


def frontier(
    model: str | os.PathLike[str],
    config: FrontierConfig,
    output: str | os.PathLike[str],
    on_progress: OnProgress = lambda *_: None,
    on_combination: OnCombination = lambda _: None,
) -> FrontierReport:
    """Write the fastest combination under the target to ``output``, with frontier.json.

    Thresholds, search and figures each see windows of the calibration text that pruning does not,
    and none in common. The output appears when it is complete; a stopped run leaves nothing.

    Args:
        on_combination: told of every combination as soon as its quality is known.

    Raises:
        ValueError: a bad option, model or text.
    """
    started = time.perf_counter()
    with Staging(Path(output)) as staging:
        run = _Run.start(staging.directory, locate(model), config, on_progress)
        run.report.output = str(output)
        for sparsity in sorted({0.0, *config.sparsities}):
            if run.report.rows and not run.report.rows[-1].feasible:
                run.report.untried.append(sparsity)
                continue
            for row in run.combine(sparsity):
                run.report.rows.append(row)
                on_combination(row)
        run.time()
        best = run.folder(run.report.best.sparsity)
        run.report.seconds = time.perf_counter() - started
        (best / FRONTIER_FILE).write_text(run.report.to_json())
        staging.publish(best)
    return run.report


@dataclass
class _Run:
    """One run: its windows, what the dense model makes of them, and the rows so far."""

    directory: Path
    model: Path
    config: FrontierConfig
    windows: Windows
    dense: dict[str, float]
    report: FrontierReport
    on_progress: OnProgress

    @classmethod
    def start(
        cls, directory: Path, model: Path, config: FrontierConfig, on_progress: OnProgress
    ) -> _Run:
        on_progress("loading", 0, 1)
        windows = draw_windows(model, config.prune)
        if config.context > windows.report_ST.numel():
            raise ValueError(
                f"context {config.context}: the prompt comes from the held-out windows, which have "
                f"{windows.report_ST.numel()} tokens; ask for less, or give more --samples"
            )
        loaded = load_to_measure(model, config.prune.device, config.prune.dtype)
        check_context(loaded, config.context + config.tokens)
        dense = {name: mean_nll(loaded, text_ST) for name, text_ST in _texts(windows).items()}
        device = select_device(config.prune.device)
        report = FrontierReport(
            model=str(model),
            output="",
            config=asdict(config),
            environment=environment(device, loaded.dtype),
            text=windows.apart.source,
            dense_ppl={name: float(torch.tensor(nll).exp()) for name, nll in dense.items()},
        )
        return cls(directory, model, config, windows, dense, report, on_progress)

    def folder(self, sparsity: float) -> Path:
        return self.directory / f"weights-{sparsity:g}"

    def combine(self, sparsity: float) -> list[Combination]:
        """Prune, and find the largest activation sparsity: one row without it, one with it."""
        folder = self.folder(sparsity)
        folder.mkdir()
        nll = self.dense
        if sparsity:
            nll = self._prune(sparsity, folder)
        else:
            copy_weights(open_stored(self.model), folder, LevelTable(self.config.criterion, (), ()))
        increase = {name: ppl_increase(nll[name], self.dense[name]) for name in nll}
        feasible = increase["search"] <= self.config.max_ppl_increase
        nbytes = open_stored(folder).nbytes
        plain = Combination(sparsity, DENSE, 0.0, increase, nbytes, feasible)
        if not feasible:
            shutil.rmtree(folder)
            return [plain]
        skipping = self._skip(plain, folder)
        return [plain] if skipping is None else [plain, skipping]

    def _prune(self, sparsity: float, folder: Path) -> dict[str, float]:
        """Negative log likelihoods of the pruned model by text."""

        def tell(progress: Progress) -> None:
            text = f"{100 * sparsity:.4g}% of the weights: {progress.text}"
            self.on_progress(text, progress.done, progress.total or 0)

        config = replace(self.config.prune, pattern=f"{sparsity:g}")
        report = prune_into(folder, self.model, config, tell, self.windows.pruning)
        report.output = self.report.output
        report.save(folder / REPORT_FILE)
        return_freed_memory()
        self.on_progress(f"{100 * sparsity:.4g}% of the weights: measuring", 0, 1)
        loaded = load_to_measure(folder, config.device, config.dtype)
        return {name: mean_nll(loaded, text_ST) for name, text_ST in _texts(self.windows).items()}

    def _skip(self, plain: Combination, folder: Path) -> Combination | None:
        """The same weights at the level that reaches the target; None where there is none."""

        def tell(progress: LevelProgress) -> None:
            text = f"{100 * plain.sparsity:.4g}% of the weights, {progress.phase}"
            self.on_progress(text, progress.done, progress.total or 0)

        config = levels_of(self.config.prune, self.config.levels)
        return_freed_memory()
        try:
            report = add_levels(folder, config, tell, self.windows.apart, self.dense)
        except TargetNotMet:
            return None
        report.model, report.output = self.report.model, self.report.output
        report.save(folder / LEVELS_REPORT_FILE)
        level = report.levels[0]
        increase = {name: level["texts"][name]["ppl_increase"] for name in self.dense}
        return replace(
            plain,
            level=level["name"],
            activation_sparsity=level["sparsity"],
            ppl_increase=increase,
        )

    def time(self) -> None:
        """Every feasible combination once a round, forwards and backwards in turns."""
        rows = [index for index, row in enumerate(self.report.rows) if row.feasible]
        speeds: dict[int, list[float]] = {index: [] for index in rows}
        total = self.config.rounds * len(rows)
        before = torch.get_num_threads()
        torch.set_num_threads(self.config.threads or before)
        try:
            for round_ in range(self.config.rounds):
                for index in rows if round_ % 2 == 0 else reversed(rows):
                    self.on_progress("timing", sum(map(len, speeds.values())), total)
                    speeds[index].append(self._speed(self.report.rows[index]))
        finally:
            torch.set_num_threads(before)
        for index, found in speeds.items():
            self.report.rows[index] = replace(self.report.rows[index], speeds=tuple(found))
        self.report.chosen = max(rows, key=lambda i: self.report.rows[i].tokens_per_second)

    def _speed(self, row: Combination) -> float:
        """Tokens per second behind a prompt of held-out text."""
        from prune_llm.integration import load

        config = self.config
        return_freed_memory()
        model = load(self.folder(row.sparsity)).eval()
        tokenizer = load_tokenizer(model)
        ids = self.windows.report_ST.flatten()[: config.context].tolist()
        decoder = new_decoder(model, config.context + config.tokens, row.level)
        self.report.decoder = decoder.name
        time_plan(decoder, ids, min(WARM_UP, config.tokens), tokenizer)
        return time_plan(decoder, ids, config.tokens, tokenizer)[1]


def _texts(windows: Windows) -> dict[str, Tensor]:
    return {"search": windows.apart.search_ST, "held_out": windows.apart.held_out_ST}
