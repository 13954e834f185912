"""How fast a packed model decodes: linear by linear and token by token, beside torch's dense.

Baseline and ours take turns in one run, and so does a read of a large buffer: "limit" is the share
of the byte limit, bytes that must be read / bandwidth measured in the same round / time. What gives
wrong results is not timed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_llm.channel_linear import ChannelLinear
from prune_llm.config import check_device, select_device
from prune_llm.decoder import PlanDecoder, new_decoder
from prune_llm.parts import ModelParts, read_parts
from prune_llm.report import cpu_name
from prune_llm.sparse_experts import packed_weights
from prune_llm_eval.decode_speed import DecodeRow, time_decoding
from prune_llm_eval.linear_speed import LinearRow, Weight, check_linears, kinds_of, time_linear
from prune_llm_eval.resident import Resident, measure_resident
from prune_llm_kernels import cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BANDWIDTH_BYTES = 512 * 2**20
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed.

    Attributes:
        contexts: prompt lengths of the end-to-end runs.
        tokens: decoded in each.
        rounds: in which everything takes its turn; figures are medians.
        threads: numbers of threads; (): one, and as many as torch uses. Not for a GPU.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        batches: rows of x of the linear-by-linear table; (): leave it out.
    """

    contexts: tuple[int, ...] = (16, 512)
    tokens: int = 64
    rounds: int = 3
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    device: str = "auto"

    def __post_init__(self) -> None:
        check_device(self.device)
        for name in ("contexts", "threads", "batches"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} {value}: must be at least 1")
        if not self.contexts:
            raise ValueError("contexts: give at least one prompt length")
        if self.tokens < 2:
            raise ValueError(f"tokens {self.tokens}: must be at least 2, the first is the prompt's")
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds}: must be at least 1")

    def thread_counts(self, device: torch.device) -> tuple[int | None, ...]:
        """One after the other; None where no thread of the CPU computes."""
        if device.type != "cuda":
            return self.threads or tuple(sorted({1, torch.get_num_threads()}))
        if self.threads:
            raise ValueError(
                f"threads {', '.join(map(str, self.threads))}: {device} has none; leave them out, "
                "or give --device cpu"
            )
        return (None,)


@dataclass
class SpeedReport:
    """Everything that was measured, and where."""

    about: dict[str, Any]
    resident: Resident | None  # of a process on a CPU
    linears: list[LinearRow] = field(default_factory=list)
    decodes: list[DecodeRow] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.linears) + len(self.decodes)

    def json_line(self) -> str:
        return json.dumps(asdict(self))


def measure(
    model: str, against: str | None, config: SpeedConfig, on_progress: OnProgress
) -> SpeedReport:
    """Time the packed checkpoint ``model``.

    Args:
        against: the dense model to compare with; None: the same model with its zeros stored.

    Raises:
        ValueError: nothing packed in it, a baseline of another shape, a model that has no plan, a
            device that does not exist, numbers of threads for a GPU.
        RuntimeError: a result is wrong; nothing is timed then.
    """
    from transformers.utils import logging

    from prune_llm.integration import load

    device = select_device(config.device)
    threads = config.thread_counts(device)
    logging.disable_progress_bar()
    on_progress("loading", 0, 1)
    sparse = load(model, device=str(device)).eval()
    names = list(_packed(sparse, model))
    parts = _parts(sparse)
    # on a GPU another form than was loaded
    packed = _channels(sparse, names) if device.type == "cuda" else _packed(sparse, model)
    longest = max(config.contexts) + config.tokens
    check_context(sparse, longest)
    resident = None
    if device.type == "cpu":
        resident = measure_resident(model, max(config.contexts), config.tokens)
    settings: dict[str, Any] = {"dtype": parts.dtype, "device": str(device)}
    dense = load(against or model, dequantize=against is None, **settings).eval()
    check_linears(packed)
    report = SpeedReport(_about(model, against, parts), resident)
    buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64, device=device)
    before = torch.get_num_threads()
    kinds = kinds_of(packed, dense)
    total = len(threads) * (len(kinds) * len(config.batches) + len(config.contexts))
    try:
        for count in threads:
            torch.set_num_threads(count or before)
            where = str(parts.device) if count is None else f"{count} threads"
            for batch in config.batches:
                for kind, pairs in kinds.items():
                    on_progress(f"{kind}, {where}", report.rows, total)
                    report.linears.append(time_linear(kind, pairs, batch, config.rounds, buffer))
            for context in config.contexts:
                on_progress(f"context {context}, {where}", report.rows, total)
                report.decodes.append(
                    time_decoding(sparse, dense, context, config.tokens, config.rounds, buffer)
                )
    finally:
        torch.set_num_threads(before)
    return report


def _packed(model: PreTrainedModel, name: str) -> dict[str, Weight]:
    found: dict[str, Weight] = dict(packed_weights(model))
    if not found:
        raise ValueError(
            f"{name}: holds no packed weights; prune it, or write it with "
            "prune-llm export --format sparse"
        )
    return found


def _parts(model: PreTrainedModel) -> ModelParts:
    decoder = new_decoder(model, 16)
    if not isinstance(decoder, PlanDecoder):
        raise ValueError(f"{type(model).__name__}: decodes through {decoder.name}; no plan to time")
    return read_parts(model)


def check_context(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError for a prompt and its answer that do not fit."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"contexts and tokens: {longest} together, the model's context is {context}; ask for "
            "less"
        )


def _channels(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Weight]:
    """The same weights, once a decoder has put them into the order of a GPU."""
    found: dict[str, Weight] = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, ChannelLinear)
        found[name] = module.channel_weight
    return found


def _about(model: str, against: str | None, parts: ModelParts) -> dict[str, Any]:
    return {
        "model": Path(model).name,
        "against": None if against is None else Path(against).name,
        "device": str(parts.device),
        **_hardware(parts.device),
        "torch": torch.__version__,
        "dtype": str(parts.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
    }


def _hardware(device: torch.device) -> dict[str, str]:
    """What computes: nothing of the CPU is told where a GPU does."""
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    isa = cpu.isa_names()[cpu.isa_index()]
    return {"cpu": cpu_name(), "isa": isa, "thread_pool": cpu.thread_pool_name()}
