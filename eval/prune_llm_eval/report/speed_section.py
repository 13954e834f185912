"""The part of a report that tells speed and memory: measured, then put into plain values."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from prune_llm.decoder import recordable
from prune_llm.report import cpu_name
from prune_llm.sparse_linear import SparseLinear
from prune_llm_eval import speed
from prune_llm_eval.linear_speed import CACHED_BYTES, check_linears
from prune_llm_eval.resident import measure_resident
from prune_llm_eval.throughput import (
    GENERATE,
    Load,
    Throughput,
    ThroughputConfig,
    Timing,
    Variant,
    measure_throughput,
)
from prune_llm_kernels import cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnProgress = Callable[[str, int, int], None]
DEFAULT_CONTEXTS = (16, 128, 512)
DENSE, MODEL, TRANSFORMERS = "dense", "model", "transformers"
# rounds that must agree before anything is called faster or slower
LEAST_ROUNDS = 3


def speed_section(
    model: str,
    against: str | None,
    levels: Sequence[str],
    config: ThroughputConfig,
    on_progress: OnProgress,
) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """Time ``model``, its levels and the dense model; and what each holds in memory, by role.

    Without ``against`` the baseline is the model with its zeros stored as zeros.

    Raises:
        ValueError: a level, a context or a baseline that does not fit.
        RuntimeError: a kernel gives a wrong result; nothing is timed then.
    """
    from prune_llm.integration import load

    on_progress("loading", 0, 1)
    sparse = load(model).eval()
    contexts = fitting_contexts(config, getattr(sparse.config, "max_position_embeddings", None))
    check_linears(packed_weights(sparse))
    dense = load(against or model, dequantize=against is None, dtype=sparse.dtype).eval()
    memory = {MODEL: _memory(sparse), DENSE: _memory(dense)}
    if recordable(sparse) is None and recordable(dense) is None:
        on_progress("measuring memory", 0, 1)
        names = {MODEL: model} | ({DENSE: against} if against else {})
        for role, name in names.items():
            found = measure_resident(name, max(contexts), config.tokens)
            memory[role] |= {"process": found.loaded, "libraries": found.imported}
    variants = [Variant(DENSE, dense), Variant(MODEL, sparse)]
    if levels:
        # another copy: the first level puts the weights into another order, for good
        ordered = load(model).eval()
        variants += [Variant(f"level {level}", ordered, level) for level in levels]
    variants.append(Variant(TRANSFORMERS, dense, GENERATE))
    buffer = torch.ones(speed.BANDWIDTH_BYTES // 8, dtype=torch.int64)
    loads = config.loads(contexts)
    about = _about(sparse, config, contexts, against is None)
    measured = measure_throughput(variants, loads, config, buffer, on_progress)
    return {**about, "engines": measured.engines, "loads": tell(measured)}, memory


def packed_weights(model: PreTrainedModel) -> dict[str, Any]:
    """By the path of the linear; none in a model stored dense."""
    return {
        path: module.packed_weight()
        for path, module in model.named_modules()
        if isinstance(module, SparseLinear)
    }


def fitting_contexts(config: ThroughputConfig, longest: int | None) -> tuple[int, ...]:
    """Those asked for, else those of the defaults that fit, at least one.

    Raises:
        ValueError: a prompt and its answer do not fit the model's context ``longest``.
    """
    fitting = [c for c in DEFAULT_CONTEXTS if longest is None or c + config.tokens <= longest]
    contexts = config.contexts or tuple(fitting) or DEFAULT_CONTEXTS[:1]
    whole = max(contexts) + config.tokens
    if longest is not None and whole > longest:
        raise ValueError(
            f"contexts and tokens: {whole} together, the model's context is {longest}; ask for less"
        )
    return contexts


def _memory(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights as they lie in memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return {"weights": sum(x.nbytes for x in {x.data_ptr(): x for x in tensors}.values())}


def _about(
    model: PreTrainedModel, config: ThroughputConfig, contexts: Sequence[int], own_zeros: bool
) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "instructions": cpu.isa_names()[cpu.isa_index()],
        "threads": config.threads or torch.get_num_threads(),
        # what ran in the last minute, this process included
        "load_average": round(os.getloadavg()[0], 1),
        "cores": len(os.sched_getaffinity(0)),
        "thread_pool": cpu.thread_pool_name(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "baseline": "the model with its zeros stored" if own_zeros else "the dense model",
        "packed_linears": len(packed_weights(model)),
        "config": {**asdict(config), "contexts": list(contexts)},
    }


def tell(measured: Throughput) -> list[dict[str, Any]]:
    """By load, the baseline first."""
    return [_tell_load(measured, load) for load in measured.bandwidth]


def _tell_load(measured: Throughput, load: Load) -> dict[str, Any]:
    timings = [timing for timing in measured.timings if timing.load == load]
    baselines = {
        name: next(timing for timing in timings if timing.variant == name)
        for name in (DENSE, TRANSFORMERS)
    }
    bandwidth = measured.bandwidth[load]
    return {
        "context": load.context,
        "batch": load.batch,
        "bandwidth": spread(bandwidth),
        "rows": [_tell_timing(timing, baselines, bandwidth) for timing in timings],
    }


def _tell_timing(
    timing: Timing, baselines: dict[str, Timing], bandwidth: Sequence[float]
) -> dict[str, Any]:
    """Seconds and rates of a variant, and how they compare with the baseline round by round."""
    load, nbytes = timing.load, timing.step_bytes
    row: dict[str, Any] = {
        "variant": timing.variant,
        "ttft": spread(timing.first),
        "tpot": spread(timing.step),
        "prompt_tokens_per_second": spread([load.batch * load.context / s for s in timing.first]),
        "decode_tokens_per_second": spread([load.batch / s for s in timing.step]),
        "active": timing.active,
        "bytes_per_step": nbytes,
        "bytes_per_token": None if nbytes is None else nbytes / load.batch,
        "cached": None if nbytes is None else nbytes < CACHED_BYTES,
        "bandwidth_share": None,
        "decode_gain": None,
        "prompt_gain": None,
        "transformers_gain": None,
        "transformers_prompt_gain": None,
    }
    if nbytes is not None:
        shares = [nbytes / s / b for s, b in zip(timing.step, bandwidth, strict=True)]
        row["bandwidth_share"] = spread(shares)
    dense, transformers = baselines[DENSE], baselines[TRANSFORMERS]
    if timing is not dense:
        row["decode_gain"] = gain(dense.step, timing.step)
        row["prompt_gain"] = gain(dense.first, timing.first)
    if timing is not transformers:
        row["transformers_gain"] = gain(transformers.step, timing.step)
        row["transformers_prompt_gain"] = gain(transformers.first, timing.first)
    return row


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of the rounds, and the rounds themselves."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "rounds": list(values),
    }


def gain(dense: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """Times as fast as the baseline, paired by round; ``clear`` where enough rounds all agree."""
    ratios = [theirs / mine for theirs, mine in zip(dense, own, strict=True)]
    clear = None
    if len(ratios) >= LEAST_ROUNDS:
        clear = "faster" if min(ratios) > 1 else "slower" if max(ratios) < 1 else None
    return {**spread(ratios), "clear": clear}
