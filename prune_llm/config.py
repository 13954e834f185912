"""What a pruning run is asked for: every option, its checks, the device it names."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from prune_llm.allocation import ALLOCATIONS
from prune_llm.architecture import RUN_DTYPES
from prune_llm.calibration import Sampling
from prune_llm.masks import Pattern
from prune_llm.methods import METHODS
from prune_llm.plan import check_allocation
from prune_llm.presets import DEFAULT as DEFAULT_QUALITY
from prune_llm.presets import preset
from prune_llm.refinement import REFINEMENTS

FORMATS = ("dense", "sparse")
TARGETS = ("pruned", "dense")
ACTIVATIONS = ("auto", "memory", "disk")
GOALS = ("none", "block", "logits")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class PruneConfig:
    """Everything that decides the result; saved with it.

    Attributes:
        method: a key of ``METHODS``.
        pattern: "0.5" (sparsity of every linear) or "2:4" (2 kept of every 4 inputs).
        calibration: text or JSONL file, "bundled" stories, or a `datasets` name
            NAME[:CONFIG[:SPLIT]]. None: bundled where the method needs data, else no data at all.
        separator: line between the documents of a text file; None: one document.
        samples: calibration windows; seq_len: tokens in each (None: the model's context, at most
            2048); sampling: "random" windows by ``seed``, or the "first" ones.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        dtype: what blocks run in while calibrating: "auto" (as stored), "float32", "bfloat16",
            "float16". The dtype on disk never changes.
        damping: fraction of the mean diagonal added to the Gram matrix (SparseGPT, dense target).
        column_block: columns SparseGPT updates together.
        target: what a linear's output should stay: "pruned", that of its dense weights on the
            pruned model's inputs, or "dense", that of the dense model (see `dense_target`). The
            dense model's activations are then kept beside the pruned one's, and a block's dense
            weights beside its pruned ones; the method prunes weights re-solved for the target.
        reconstruction: what the kept weights of a block are trained towards once its linears are
            solved (see `reconstruction`): "none", the dense "block"'s output, or the dense model's
            predictions ("logits").
        reconstruction_steps: at most so many for each block (None: 400, or as many as the minutes
            allow); reconstruction_minutes: of training in the whole run, the same for each block.
        reconstruction_rate: highest step of a weight, as a share of its matrix's root mean square;
            None: by the model's width, see `reconstruction.default_rate`.
        refine: what is done to a method's result on the Gram matrix (see `refinement`): "none",
            "swaps" in its mask, "backsolve" of its weights, or "both".
        allocation: how the linears share the sparsity: "uniform", or a key of ``ALLOCATIONS``.
        overrides: "NAMES=PATTERN": linears (shell patterns as in ``ignore``) with a sparsity or N:M
            of their own; ``pattern`` and ``allocation`` are for the others. The last match counts.
        batch_size: samples run at once; None: as many as hold 512 tokens (more if narrow).
        activations: where the calibration activations are kept between two blocks: in "memory", on
            "disk" beside the output, or "auto": in memory while they take up to half of what is
            available. The result is the same.
        experts: where the experts of the block in work lie: in "memory", on "disk" (mapped, so that
            only those in use need memory), or "auto": in memory while they take up to half of what
            is available. The result is the same. On disk: on a CPU, without reconstruction.
        ignore: shell patterns over linear names ("model.layers.0.*", "mlp.down_proj") left dense.
        format: how weights are stored: "dense" (plain zeros) or "sparse" (packed; export converts).
    """

    method: str = "sparsegpt"
    pattern: str = "0.5"
    calibration: str | None = None
    separator: str | None = None
    samples: int = 128
    seq_len: int | None = None
    sampling: Sampling = "random"
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    damping: float = 0.01
    column_block: int = 128
    target: str = "pruned"
    reconstruction: str = "none"
    reconstruction_steps: int | None = None
    reconstruction_minutes: float | None = None
    reconstruction_rate: float | None = None
    refine: str = "none"
    allocation: str = "uniform"
    overrides: tuple[str, ...] = ()
    batch_size: int | None = None
    activations: str = "auto"
    experts: str = "auto"
    ignore: tuple[str, ...] = ()
    format: str = "sparse"

    def __post_init__(self) -> None:
        _check_choice("method", self.method, tuple(METHODS))
        _check_choice("format", self.format, FORMATS)
        _check_choice("target", self.target, TARGETS)
        _check_choice("reconstruction", self.reconstruction, GOALS)
        self._check_reconstruction()
        _check_choice("allocation", self.allocation, tuple(ALLOCATIONS))
        _check_choice("refine", self.refine, REFINEMENTS)
        _check_choice("dtype", self.dtype, ("auto", *RUN_DTYPES))
        _check_choice("activations", self.activations, ACTIVATIONS)
        _check_choice("experts", self.experts, ACTIVATIONS)
        if self.experts == "disk" and self.reconstruction != "none":
            raise ValueError(
                f"experts 'disk': reconstruction {self.reconstruction!r} trains all experts of a "
                "block together, in memory; give --reconstruction none, or leave --experts out"
            )
        _check_choice("sampling", self.sampling, ("random", "first"))
        check_device(self.device)
        if Pattern.parse(self.pattern).sparsity == 0:
            raise ValueError(f"pattern {self.pattern!r}: prunes nothing; give a sparsity above 0")
        check_allocation(self)
        for name in ("samples", "seq_len", "column_block", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        if not (math.isfinite(self.damping) and 0 <= self.damping <= 10):
            raise ValueError(f"damping {self.damping}: must be in [0, 10]; 0.01 is usual")

    @classmethod
    def of_quality(cls, quality: str = DEFAULT_QUALITY, **options: Any) -> PruneConfig:
        """A preset (see `presets`) with other fields, or with some of its own replaced.

        Raises:
            ValueError: there is no such preset, or a bad option.
        """
        pattern = Pattern.parse(options.get("pattern", cls.pattern))
        return cls(**{**preset(quality, pattern), **options})

    def _check_reconstruction(self) -> None:
        for name in ("reconstruction_steps", "reconstruction_minutes", "reconstruction_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} {value}: must be above 0")
            if self.reconstruction == "none":
                raise ValueError(
                    f"{name} {value}: nothing is reconstructed; give --reconstruction as well, "
                    f"{' or '.join(GOALS[1:])}"
                )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r}: unknown; choose one of {', '.join(choices)}")


def check_device(name: str) -> None:
    """Raise ValueError unless it is "auto", "cpu", "cuda" or "cuda:1", there or not."""
    if name not in DEVICES and not re.fullmatch(r"cuda:\d{1,3}", name, re.ASCII):
        raise ValueError(f"device {name!r}: unknown; choose one of {', '.join(DEVICES)}, cuda:N")


def select_device(name: str) -> torch.device:
    """The torch device of such a name; ValueError where it is absent."""
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (torch.device(name).index or 0) >= count:
            raise ValueError(
                f"device {name!r}: this machine has {count} CUDA devices that torch can use; "
                "give --device cpu"
            )
    return torch.device(name)
