"""The table of levels in a checkpoint: thresholds by site, what they realise and what they cost.

It lies in config.json under ``quantization_config.activation``, in numbers, so that nothing needs
sharding. The level "dense" always exists and skips nothing.

A site is an input that linears share: of q, k, v; of o; of gate, up; of down; of an expert's. Or it
is one linear, and several sites may read the same input, each by its own threshold. An input x_i of
a site is active where ``|x_i| * c_i > t``, computed in float32, with the level's threshold t of the
site and c_i of the criterion: 1 for "magnitude" (TEAL, 2408.14690), for "weight-aware" the root of
the summed squares of the columns i of the site's linears (the score of WINA, 2505.19427, with one
norm for the site).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"
CRITERIA = ("magnitude", "weight-aware")


@dataclass(frozen=True)
class ActivationSite:
    """An input shared by ``linears`` (module names in the model), of ``in_features`` channels."""

    name: str
    linears: tuple[str, ...]
    in_features: int


@dataclass(frozen=True)
class Level:
    """One set of thresholds.

    Attributes:
        thresholds: one per site of the table; 0 skips only zeros.
        sparsity: realised on text the thresholds were not taken from, weighted by the weights that
            the inputs meet; site_sparsity: the same for each site.
        ppl_increase: on that text, as a fraction (0.01: 1 %); None where it was not measured.
        tokens: of that text.
    """

    name: str
    thresholds: tuple[float, ...]
    sparsity: float = 0.0
    site_sparsity: tuple[float, ...] = ()
    ppl_increase: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class LevelTable:
    """All levels of a checkpoint.

    Attributes:
        criterion: one of CRITERIA.
        calibration: what the thresholds were taken from, with its hash, and how.
    """

    criterion: str
    sites: tuple[ActivationSite, ...]
    levels: tuple[Level, ...]
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [DENSE, *(level.name for level in self.levels)]

    def level(self, name: str) -> Level:
        """ValueError, listing the levels there are, where there is none of that name."""
        if name == DENSE:
            return Level(DENSE, (0.0,) * len(self.sites))
        for level in self.levels:
            if level.name == name:
                return level
        raise ValueError(f"level {name!r}: does not exist; this model has {', '.join(self.names)}")

    def to_json(self) -> dict[str, Any]:
        return {
            "criterion": self.criterion,
            "calibration": self.calibration,
            "sites": [
                {"name": s.name, "linears": list(s.linears), "in_features": s.in_features}
                for s in self.sites
            ],
            "levels": [
                {
                    "name": level.name,
                    "thresholds": list(level.thresholds),
                    "sparsity": level.sparsity,
                    "site_sparsity": list(level.site_sparsity),
                    "ppl_increase": level.ppl_increase,
                    "tokens": level.tokens,
                }
                for level in self.levels
            ],
        }

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> LevelTable:
        """ValueError where the settings are damaged or ask for what this version does not know."""
        try:
            table = cls(
                str(settings["criterion"]),
                tuple(
                    ActivationSite(s["name"], tuple(s["linears"]), int(s["in_features"]))
                    for s in settings["sites"]
                ),
                tuple(_level(entry) for entry in settings["levels"]),
                dict(settings.get("calibration", {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"activation thresholds in config.json: damaged ({type(error).__name__}: {error})"
            ) from None
        table._check()
        return table

    def _check(self) -> None:
        where = "activation thresholds in config.json"
        if self.criterion not in CRITERIA:
            known = ", ".join(CRITERIA)
            raise ValueError(f"{where}: criterion {self.criterion!r} is unknown; {known} are known")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"{where}: two levels have one name ({', '.join(self.names)})")
        for level in self.levels:
            bad = [t for t in level.thresholds if not (math.isfinite(t) and t >= 0)]
            if len(level.thresholds) != len(self.sites) or bad:
                raise ValueError(
                    f"{where}: level {level.name!r} must have {len(self.sites)} finite thresholds "
                    "of 0 or more, one per site"
                )


def _level(entry: Mapping[str, Any]) -> Level:
    increase = entry.get("ppl_increase")
    return Level(
        str(entry["name"]),
        tuple(float(threshold) for threshold in entry["thresholds"]),
        float(entry.get("sparsity", 0.0)),
        tuple(float(share) for share in entry.get("site_sparsity", ())),
        None if increase is None else float(increase),
        int(entry.get("tokens", 0)),
    )


def read_table(model: PreTrainedModel) -> LevelTable | None:
    """The table of a loaded model; None where its checkpoint has no thresholds.

    Raises:
        ValueError: damaged, or thresholds of another model: a linear of a site is missing or has
            another number of inputs.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None and not isinstance(settings, Mapping):
        settings = settings.to_dict()
    activation = (settings or {}).get("activation")
    if not activation:
        return None
    table = LevelTable.from_json(activation)
    modules = dict(model.named_modules())
    for site in table.sites:
        for name in site.linears:
            module = modules.get(name)
            width = getattr(module, "in_features", None) or getattr(module, "nx", None)
            if width != site.in_features:
                found = "no such linear" if module is None else f"one with {width} inputs"
                raise ValueError(
                    f"activation thresholds in config.json: site {site.name!r} is for linear "
                    f"{name} with {site.in_features} inputs, the model has {found}; they belong to "
                    "another model, run prune-llm sparsify on this one"
                )
    return table
