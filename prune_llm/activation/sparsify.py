"""Add a table of activation levels to a checkpoint: the configuration, the run, its report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prune_llm.activation.allocation import ALLOCATIONS
from prune_llm.activation.copying import copy_weights, write_table
from prune_llm.activation.curve import Curve, Task
from prune_llm.activation.levels import CRITERIA, Level, LevelTable
from prune_llm.activation.measure import GatedModel, Measured
from prune_llm.activation.quantiles import Quantiles
from prune_llm.activation.search import largest_sparsity, matching_sparsity
from prune_llm.activation.sites import GRANULARITIES
from prune_llm.activation.texts import Texts, read_texts
from prune_llm.architecture import RUN_DTYPES, text_width
from prune_llm.calibration import BUNDLED, Source, check_seq_len, load_tokenizer
from prune_llm.quality import check_max_ppl_increase, load_to_measure, ppl_increase
from prune_llm.report import environment
from prune_llm.sparse_checkpoint import open_stored
from prune_llm.staging import Staging

REPORT_FILE = "activation_report.json"
DEFAULT_SPARSITIES = (0.25, 0.4, 0.5)
# negative log likelihoods by text: "search", "held_out" and, where there is one, "other"
Base = Mapping[str, float]


@dataclass(frozen=True)
class SparsifyConfig:
    """Everything that decides the levels; saved with them.

    Attributes:
        activation_sparsity: overall sparsities realised on the search windows, one level each,
            called "40%". Where neither these nor targets are given: 25, 40 and 50 %.
        max_ppl_increase: targets in quality, as fractions; a level called "ppl-1%" with the largest
            sparsity that keeps each of them on the search windows.
        criterion: "magnitude" or "weight-aware" (see levels.py).
        allocation: how the sites share the sparsity: a key of ``ALLOCATIONS``.
        granularity: "site": one threshold for the input that linears share; "linear": one for
            every linear, so that q, k and v, or gate and up, skip different parts of it.
        calibration, separator, samples, seq_len, seed: as `prune` reads them; the windows are
            split into those that thresholds, search and the reported figures may see.
        held_out: another text for the reported figures; it must not repeat the calibration text.
        ignore: shell patterns over linear names whose inputs stay dense.
        device, dtype: what the model runs on and in; "auto" for dtype is as stored.
    """

    activation_sparsity: tuple[float, ...] = ()
    max_ppl_increase: tuple[float, ...] = ()
    criterion: str = "magnitude"
    allocation: str = "greedy"
    granularity: str = "site"
    calibration: str = BUNDLED
    separator: str | None = None
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    held_out: str | None = None
    ignore: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("criterion", CRITERIA),
            ("allocation", tuple(ALLOCATIONS)),
            ("granularity", GRANULARITIES),
            ("dtype", ("auto", *RUN_DTYPES)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: unknown; choose one of {', '.join(choices)}"
                )
        for share in self.activation_sparsity:
            if not 0 <= share < 1:
                raise ValueError(f"activation_sparsity {share}: must be in [0, 1), such as 0.4")
        for target in self.max_ppl_increase:
            check_max_ppl_increase("max_ppl_increase", target)
        if self.samples < 4:
            raise ValueError(f"samples {self.samples}: must be at least 4, they are split in three")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"seq_len {self.seq_len}: must be at least 2, one token predicts one")
        names = [level_name(s) for s in self.sparsities]
        names += [target_name(p) for p in self.max_ppl_increase]
        if len(set(names)) != len(names):
            raise ValueError(f"levels {', '.join(names)}: two have one name; give each only once")

    @property
    def sparsities(self) -> tuple[float, ...]:
        if self.activation_sparsity or self.max_ppl_increase:
            return tuple(sorted(self.activation_sparsity))
        return DEFAULT_SPARSITIES


def level_name(sparsity: float) -> str:
    return f"{100 * sparsity:g}%"


def target_name(increase: float) -> str:
    return f"ppl-{100 * increase:g}%"


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` steps of the phase; total None where it is not known before."""

    phase: str
    done: int
    total: int | None


OnProgress = Callable[[Progress], None]


@dataclass
class SparsifyReport:
    """What a run did; saved as activation_report.json.

    Attributes:
        levels: for each level its site sparsities by name, and its figures on each text.
        dense_ppl: by text: "search", "held_out" and, where one was given, "other".
    """

    model: str
    output: str
    config: dict[str, Any]
    calibration: dict[str, Any]
    environment: dict[str, str]
    dense_ppl: dict[str, float] = field(default_factory=dict)
    levels: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")


def sparsify(
    model: str | os.PathLike[str],
    config: SparsifyConfig | None = None,
    output: str | os.PathLike[str] = "sparsified",
    on_progress: OnProgress | None = None,
) -> SparsifyReport:
    """Calibrate activation levels for ``model`` and write it with them to ``output``.

    The weights are copied byte for byte, packed or dense as they are. The output appears when it
    is complete; on any error nothing is left behind.

    Args:
        model: directory or hub name, dense or pruned.

    Raises:
        ValueError: a bad option, model or text, activations that are not finite, or a target in
            quality that cannot be met; the message says what can.
    """
    config = config or SparsifyConfig()
    started = time.perf_counter()
    source = open_stored(model)
    with Staging(Path(output)) as staging:
        copy_weights(source, staging.directory, LevelTable(config.criterion, (), ()))
        report = add_levels(staging.directory, config, on_progress)
        report.model, report.output = str(source.directory), str(output)
        report.seconds = time.perf_counter() - started
        report.save(staging.directory / REPORT_FILE)
        staging.publish()
    return report


def add_levels(
    directory: Path,
    config: SparsifyConfig,
    on_progress: OnProgress | None = None,
    texts: Texts | None = None,
    base: Base | None = None,
) -> SparsifyReport:
    """Calibrate levels on a directory in the sparse form and write them, and the report, into it.

    Args:
        texts: windows that were drawn already; the text settings of ``config`` are not read then.
        base: negative log likelihoods, by text, of the dense model before pruning: increases are
            over them then, and not over the directory's own dense level.
    """
    started = time.perf_counter()
    run = _Run.start(directory, config, on_progress, texts, base)
    table, report = run.calibrate(str(directory), str(directory))
    write_table(directory, table)
    report.seconds = time.perf_counter() - started
    report.save(directory / REPORT_FILE)
    return report


@dataclass
class _Run:
    """One run: the loaded model with its sites, the texts, and who is told of the progress."""

    config: SparsifyConfig
    gated: GatedModel
    texts: Texts
    on_progress: OnProgress | None
    base: Base | None = None
    phase: Progress = Progress("loading", 0, None)
    searched: dict[tuple[float, ...], Measured] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        directory: Path,
        config: SparsifyConfig,
        on_progress: OnProgress | None,
        texts: Texts | None,
        base: Base | None,
    ) -> _Run:
        model = load_to_measure(directory, config.device, config.dtype)
        texts = texts or cls._read(directory, config, text_width(model))
        gated = GatedModel.of(model, config.criterion, config.ignore, config.granularity)
        run = cls(config, gated, texts, on_progress, base)
        gated.tick = run._tick
        return run

    @staticmethod
    def _read(directory: Path, config: SparsifyConfig, context: int) -> Texts:
        check_seq_len(config.seq_len, context)
        seq_len = config.seq_len or min(2048, context)
        calibration = Source(
            config.calibration, config.separator, config.samples, seq_len, config.seed, "random"
        )
        held_out = None
        if config.held_out is not None:
            held_out = Source(
                config.held_out, config.separator, config.samples, seq_len, config.seed, "first"
            )
        return read_texts(calibration, held_out, load_tokenizer(directory))

    def calibrate(self, model: str, output: str) -> tuple[LevelTable, SparsifyReport]:
        """The table, and what it costs on the text that neither thresholds nor search saw."""
        self._begin("counting activations", self.gated.batches(self.texts.fit_ST))
        quantiles = self.gated.quantiles(self.texts.fit_ST)
        report = SparsifyReport(
            model=model,
            output=output,
            config=asdict(self.config),
            calibration=self.texts.source,
            environment=environment(self.gated.model.device, self.gated.model.dtype),
        )
        dense = self._figures("dense", self.gated.dense)
        report.dense_ppl = {text: measured.ppl for text, measured in dense.items()}
        base = self.base or {text: measured.nll for text, measured in dense.items()}
        levels = []
        for name, thresholds in self._thresholds(quantiles).items():
            figures = self._figures(name, thresholds)
            levels.append(_level(name, thresholds, figures, base))
            report.levels.append(_entry(levels[-1], figures, base, self.gated))
        sites = tuple(site.site for site in self.gated.sites)
        chosen = {name: getattr(self.config, name) for name in ("allocation", "granularity")}
        settings = {**chosen, **self.texts.source}
        if self.base is not None:
            settings["ppl_increase_over"] = "the dense model before pruning"
        return LevelTable(self.config.criterion, sites, tuple(levels), settings), report

    def _thresholds(self, quantiles: Quantiles) -> dict[str, list[float]]:
        """Thresholds of every level, by its name."""
        found = {}
        if self.config.sparsities:
            curve = self._curve(quantiles, self.config.sparsities)
            for wanted in self.config.sparsities:
                name = level_name(wanted)
                planned = matching_sparsity(self._realised(name, quantiles, curve), wanted)
                found[name] = quantiles.thresholds(curve.at(planned))
        if self.config.max_ppl_increase:
            found |= self._within_targets(quantiles)
        return found

    def _within_targets(self, quantiles: Quantiles) -> dict[str, list[float]]:
        """Found with the cheapest allocation first, so that the asked one knows where to work."""
        targets = sorted(self.config.max_ppl_increase)
        curve = ALLOCATIONS["uniform"](self._task(quantiles, ()))
        best = [self._largest(quantiles, curve, target) for target in targets]
        if self.config.allocation != "uniform":
            curve = self._curve(quantiles, tuple(best))
            best = [self._largest(quantiles, curve, target) for target in targets]
        return {
            target_name(target): quantiles.thresholds(curve.at(planned))
            for target, planned in zip(targets, best, strict=True)
        }

    def _largest(self, quantiles: Quantiles, curve: Curve, target: float) -> float:
        return largest_sparsity(self._increase(target_name(target), quantiles, curve), target)

    def _task(self, quantiles: Quantiles, targets: tuple[float, ...]) -> Task:
        return Task(self.gated, quantiles, self.texts.fit_ST, targets)

    def _curve(self, quantiles: Quantiles, targets: tuple[float, ...]) -> Curve:
        self._begin(f"allocation {self.config.allocation}", None)
        return ALLOCATIONS[self.config.allocation](self._task(quantiles, targets))

    def _realised(self, name: str, quantiles: Quantiles, curve: Curve) -> Callable[[float], float]:
        def realised(planned: float) -> float:
            return self._search(name, quantiles.thresholds(curve.at(planned))).sparsity

        return realised

    def _increase(self, name: str, quantiles: Quantiles, curve: Curve) -> Callable[[float], float]:
        dense = self.base or {"search": self._search(name, self.gated.dense).nll}

        def increase(planned: float) -> float:
            measured = self._search(name, quantiles.thresholds(curve.at(planned)))
            return ppl_increase(measured.nll, dense["search"])

        return increase

    def _search(self, name: str, thresholds: list[float]) -> Measured:
        known = tuple(thresholds)
        if known not in self.searched:
            self._begin(f"level {name}: searching", self.gated.batches(self.texts.search_ST))
            self.searched[known] = self.gated.measure(self.texts.search_ST, thresholds)
        return self.searched[known]

    def _figures(self, name: str, thresholds: list[float]) -> dict[str, Measured]:
        """By the name of the text."""
        texts = {"held_out": self.texts.held_out_ST, "other": self.texts.other_ST}
        found = {"search": self._search(name, thresholds)}
        for text, windows_ST in texts.items():
            if windows_ST is not None:
                self._begin(f"level {name}: measuring", self.gated.batches(windows_ST))
                found[text] = self.gated.measure(windows_ST, thresholds)
        return found

    def _begin(self, phase: str, total: int | None) -> None:
        self.phase = Progress(phase, 0, total)
        self._show()

    def _tick(self) -> None:
        self.phase = Progress(self.phase.phase, self.phase.done + 1, self.phase.total)
        self._show()

    def _show(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.phase)


def _level(
    name: str,
    thresholds: list[float],
    figures: dict[str, Measured],
    base: Base,
) -> Level:
    """Its figures are those on the other text where there is one."""
    text = "other" if "other" in figures else "held_out"
    measured = figures[text]
    return Level(
        name,
        tuple(thresholds),
        sparsity=measured.sparsity,
        site_sparsity=measured.site_sparsity,
        ppl_increase=ppl_increase(measured.nll, base[text]),
        tokens=measured.tokens,
    )


def _entry(
    level: Level, figures: dict[str, Measured], base: Base, gated: GatedModel
) -> dict[str, Any]:
    """A level in the report."""
    return {
        "name": level.name,
        "sparsity": level.sparsity,
        "ppl_increase": level.ppl_increase,
        "texts": {
            text: {
                "sparsity": measured.sparsity,
                "ppl": measured.ppl,
                "ppl_increase": ppl_increase(measured.nll, base[text]),
                "kl": measured.kl,
                "tokens": measured.tokens,
            }
            for text, measured in figures.items()
        },
        "sites": [
            {"name": site.name, "threshold": threshold, "sparsity": share}
            for site, threshold, share in zip(
                gated.sites, level.thresholds, level.site_sparsity, strict=True
            )
        ],
    }
