"""What a pruning run did, per linear and in all; saved as prune_report.json."""

from __future__ import annotations

import json
import platform
import resource
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm.architecture import Linear
from prune_llm.experts import without_index
from prune_llm.masks import Pattern
from prune_llm.methods import Solution
from prune_llm.reconstruction import BlockReconstruction
from prune_llm.statistics import LayerError
from prune_llm_kernels import tokens

if TYPE_CHECKING:
    from prune_llm.activation.sparsify import SparsifyReport


@dataclass(frozen=True)
class LinearResult:
    """One pruned linear.

    Attributes:
        name: module path; tensor: name on disk; kind: path inside its block.
        requested, achieved: sparsity as fractions; achieved counts the masked weights.
        weights: how many there are; kept: how many the mask keeps; nonzero: how many differ from
            zero on disk (a kept weight may be zero itself).
        error: relative squared error of the output on the calibration tokens
            ||(W - W') X||^2 / ||W X||^2, measured on ``error_tokens``; against the dense model's
            output with a dense target (`InputStatistics.relative_error`); None without data.
        seconds: share of its site's solving time, by size.
        method: what pruned it: the run's, or another for an expert that saw few tokens (see
            `expert_tokens`); tokens: of calibration that its input saw, None without data.
    """

    name: str
    tensor: str
    kind: str
    block: int
    shape: tuple[int, ...]
    transposed: bool
    pattern: str
    requested: float
    achieved: float
    weights: int
    kept: int
    nonzero: int
    error: float | None
    error_tokens: int
    seconds: float
    bytes_before: int
    bytes_after: int
    method: str = ""
    tokens: int | None = None

    @classmethod
    def of(
        cls,
        linear: Linear,
        tensor: str,
        block: int,
        pattern: Pattern,
        solution: Solution,
        stored: Tensor,
        *,
        error: LayerError | None,
        seconds: float,
        method: str,
        tokens: int | None,
    ) -> LinearResult:
        weights, kept = stored.numel(), int(torch.count_nonzero(solution.keep_OI))
        return cls(
            name=linear.name,
            tensor=tensor,
            kind=linear.kind,
            block=block,
            shape=tuple(stored.shape),
            transposed=linear.transposed,
            pattern=str(pattern),
            requested=pattern.sparsity,
            achieved=1 - kept / weights,
            weights=weights,
            kept=kept,
            nonzero=count_nonzero(stored),
            error=None if error is None else error.value,
            error_tokens=0 if error is None else error.tokens,
            seconds=seconds,
            bytes_before=stored.nbytes,
            bytes_after=stored.nbytes,
            method=method,
            tokens=tokens,
        )

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> LinearResult:
        """From JSON."""
        return cls(**{**saved, "shape": tuple(saved["shape"])})


def count_nonzero(weight: Tensor) -> int:
    """Weights that are not zero; none may be -0.0.

    By their bits: of bfloat16 values torch counts 5 ns each on a CPU.
    """
    assert weight.dtype.is_floating_point
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(torch.count_nonzero(weight.view(integers)))


@dataclass
class PruneReport:
    """The whole run.

    Attributes:
        peak_memory: bytes, of the process and of the GPU; predicted: what was foreseen before the
            work (`footprint.Footprint`).
        search: what was tried for a target in quality and what the found sparsity costs; None
            where the sparsity was given (`pruning_level.prune_within`).
        levels: of activation sparsity, where some were asked for; saved by name here, and whole in
            activation_report.json.
        reconstruction: of each block, where blocks were reconstructed; ``linears`` then tell the
            error that their solver left.
        allocation: how the linears share the sparsity; what each was asked for is in ``linears``.
    """

    model: str
    output: str
    config: dict[str, Any]
    model_sha256: str
    calibration: dict[str, object] | None
    environment: dict[str, str]
    linears: list[LinearResult]
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_memory: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    verification: dict[str, int] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    levels: SparsifyReport | None = None
    reconstruction: list[BlockReconstruction] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Achieved over all pruned linears, weighted by their size."""
        return 1 - sum(r.kept for r in self.linears) / sum(r.weights for r in self.linears)

    def kinds(self) -> list[KindResult]:
        grouped: dict[str, list[LinearResult]] = {}
        for result in self.linears:
            grouped.setdefault(without_index(result.kind), []).append(result)
        return [KindResult.of(name, results) for name, results in grouped.items()]

    def total(self) -> KindResult:
        return KindResult.of("total", self.linears)

    @classmethod
    def load(cls, file: Path) -> PruneReport:
        """One that was saved without levels."""
        saved = json.loads(file.read_text())
        assert saved["levels"] == []
        saved["linears"] = [LinearResult.restored(found) for found in saved["linears"]]
        saved["reconstruction"] = [BlockReconstruction(**r) for r in saved["reconstruction"]]
        return cls(**{**saved, "levels": None})

    def save(self, file: Path) -> None:
        saved = asdict(replace(self, levels=None))
        saved["levels"] = [level["name"] for level in self.levels.levels] if self.levels else []
        file.write_text(json.dumps(saved, indent=1) + "\n")


@dataclass(frozen=True)
class KindResult:
    """Linears of one kind over all blocks; ``error`` is their mean."""

    kind: str
    count: int
    requested: float
    achieved: float
    error: float | None
    seconds: float
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, kind: str, results: list[LinearResult]) -> KindResult:
        weights = sum(result.weights for result in results)
        errors = [result.error for result in results if result.error is not None]
        return cls(
            kind=kind,
            count=len(results),
            requested=sum(result.requested * result.weights for result in results) / weights,
            achieved=1 - sum(result.kept for result in results) / weights,
            error=sum(errors) / len(errors) if errors else None,
            seconds=sum(result.seconds for result in results),
            bytes_before=sum(result.bytes_before for result in results),
            bytes_after=sum(result.bytes_after for result in results),
        )


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Versions and hardware that a number depends on."""
    packages = ("prune-llm", "torch", "transformers", "safetensors", "tokenizers")
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype).removeprefix("torch."),
        "token kernels": tokens.kernel_name(device, dtype),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest resident memory of this process so far, and on the GPU, in bytes."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def resident_memory() -> int:
    """Of this process now, in bytes; its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.read_text().split()[1]) * resource.getpagesize()


def highest(peaks: list[dict[str, int]]) -> dict[str, int]:
    """The highest of each entry."""
    names = dict.fromkeys(name for peak in peaks for name in peak)
    return {name: max(peak.get(name, 0) for peak in peaks) for name in names}


def restart_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory` count from now on; False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident size
    except OSError:
        return False
    return True
