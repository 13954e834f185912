"""What a sweep tries and how it judges: its configuration, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from prune_llm import PruneConfig, SparsifyConfig
from prune_llm.activation.levels import DENSE
from prune_llm.calibration import BUNDLED
from prune_llm.prune import levels_of
from prune_llm.quality import check_max_ppl_increase
from prune_llm_eval.compare import EvalConfig
from prune_llm_eval.turns import Decoding
from prune_llm_eval.variants import Variant

KEEP = ("best", "all", "none")
# of a PruneConfig: what all variants of a sweep have in common
SHARED = (
    *("calibration", "separator", "samples", "seq_len", "sampling", "seed"),
    *("device", "dtype", "ignore", "format"),
)
# of the tasks a sweep runs, as `tasks.TaskConfig` names them
TaskSettings = Mapping[str, Any]
DENSE_MODEL = Variant(DENSE, "")


@dataclass(frozen=True)
class SweepConfig:
    """What is tried and how it is judged.

    Attributes:
        variants: how each is pruned, by its name: a method or a quality, and a pattern. All share
            text, seed, device and dtype.
        levels: of activation sparsity for every variant and for the dense model; None: none.
        text: scored on; windows: only its first so many. Cut as the calibration text is.
        tasks: settings of lm-eval tasks to run as well (see `tasks.TaskConfig`); None: none.
        max_ppl_increase: over the dense model, as a fraction: what a recommended setting may cost.
        keep: which checkpoints stay: the "best", that is the fastest within the target; "all"; or
            "none".
    """

    variants: Mapping[Variant, PruneConfig]
    levels: SparsifyConfig | None = None
    text: str = BUNDLED
    windows: int | None = None
    tasks: TaskSettings | None = None
    decoding: Decoding = field(default_factory=Decoding)
    max_ppl_increase: float = 0.05
    keep: str = "best"

    def __post_init__(self) -> None:
        if not self.variants:
            raise ValueError("variants: none are given; give methods or qualities, and patterns")
        if self.keep not in KEEP:
            raise ValueError(f"keep {self.keep!r}: unknown; choose one of {', '.join(KEEP)}")
        check_max_ppl_increase("max_ppl_increase", self.max_ppl_increase)
        for variant, config in self.variants.items():
            for name in SHARED:
                if getattr(config, name) != getattr(self.common, name):
                    raise ValueError(f"variants: {variant.name} has a {name} of its own")
        if self.common.format != "sparse":
            raise ValueError(f"format {self.common.format!r}: a sweep needs the sparse form")
        if self.levels is not None:
            levels_of(self.common, self.levels)  # raises for what does not go together
        _ = self.scoring

    @property
    def common(self) -> PruneConfig:
        """The first variant's: text, seed, device and dtype of all."""
        return next(iter(self.variants.values()))

    @property
    def scoring(self) -> EvalConfig:
        own = self.common
        settings = (self.text, own.separator, own.seq_len, self.windows, own.device, own.dtype)
        return EvalConfig(*settings, passages=0)

    def to_json(self) -> dict[str, Any]:
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        found["variants"] = {v.name: asdict(config) for v, config in self.variants.items()}
        found["levels"] = None if self.levels is None else asdict(self.levels)
        found["tasks"] = None if self.tasks is None else dict(self.tasks)
        return found | {"decoding": asdict(self.decoding)}


def options_of(config: SweepConfig) -> dict[str, Any]:
    """By name; what variants have in common once, the rest under the variant's name."""
    every = {variant.name: asdict(own) for variant, own in config.variants.items()}
    common = {
        name: value
        for name, value in asdict(config.common).items()
        if all(own[name] == value for own in every.values())
    }
    told = {
        variant: ", ".join(f"{name} {value}" for name, value in own.items() if name not in common)
        for variant, own in every.items()
    }
    levels = {} if config.levels is None else asdict(config.levels)
    return {
        "command": "sweep",
        "variants": list(every),
        **common,
        **told,
        **{f"activation_{name}": value for name, value in levels.items()},
        **{"text": config.text, "windows": config.windows},
        **(config.tasks or {}),
        **asdict(config.decoding),
    }
