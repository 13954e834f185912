"""``quantization_config`` in the config.json of a sparse checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from prune_llm.masks import Pattern

FORMAT_VERSION = 1
QUANT_METHOD = "prune_llm"


@dataclass(frozen=True)
class SparseFormat:
    """``quantization_config`` in the config.json of a sparse checkpoint.

    Attributes:
        pattern: of the pruned weights.
        ignore: modules whose matrix is stored as it was.
        in_features: I of the packed weights where it is no multiple of 8; of all others it is 8
            for each byte of a mask row.
        transposed: weights that the model stores dense as [I, O] (GPT-2's Conv1D); packed they
            are [O, I] like every other, because patterns and kernels run along the inputs.
        activation: activation thresholds, if any.
    """

    pattern: str
    ignore: tuple[str, ...] = ()
    in_features: dict[str, int] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    activation: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method {self.quant_method!r}: must be {QUANT_METHOD!r}")
        check_version(self.format_version)
        Pattern.parse(self.pattern)
        for name, width in self.in_features.items():
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"in_features of {name!r} is {width!r}; must be 1 or more")

    @classmethod
    def parse(cls, settings: dict[str, Any]) -> SparseFormat:
        """Read ``quantization_config``. Keys of a later minor revision are left out.

        Raises:
            ValueError: another method, an unknown version, or a value that is malformed.
        """
        check_version(settings.get("format_version"))
        if "pattern" not in settings:
            raise ValueError("quantization_config: has no pattern; get the checkpoint again")
        values = {
            entry.name: settings[entry.name] for entry in fields(cls) if entry.name in settings
        }
        for key, value in values.items():
            if not isinstance(value, _JSON_TYPES[key]):
                raise ValueError(f"quantization_config: {key} is {value!r}; it is damaged")
        for key in ("ignore", "transposed"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """As it is saved; what is empty and optional is left out."""
        settings: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "pattern": self.pattern,
            "ignore": list(self.ignore),
        }
        optional = {
            "in_features": self.in_features,
            "transposed": list(self.transposed),
            "activation": self.activation,
        }
        return settings | {key: value for key, value in optional.items() if value}


_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "pattern": str,
    "ignore": (list, tuple),
    "in_features": dict,
    "transposed": (list, tuple),
    "activation": dict,
    "format_version": int,
    "quant_method": str,
}


def check_version(version: object) -> None:
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        fix = "install a newer prune_llm" if newer else "the checkpoint is damaged; get it again"
        raise ValueError(
            f"format_version {version!r}: this prune_llm reads version {FORMAT_VERSION}; {fix}"
        )
