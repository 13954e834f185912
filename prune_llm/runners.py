"""Which runner computes a model's rows: keys and values of many sequences stay in a cache.

Models of Llama's parts run as one recorded plan, in which a row's result never depends on the rows
beside it (on a GPU: beside the number of rows). All others run through transformers, each sequence
by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prune_llm.activation.decoding import choose_level, model_levels
from prune_llm.decoder import recordable, use_device_order
from prune_llm.gpu_model import prepare
from prune_llm.parts import read_parts
from prune_llm.plan_runner import PlanRunner, plan_token_bytes, row_numbers
from prune_llm.segments import BatchLimits, Runner
from prune_llm.transformers_runner import TransformersRunner, measured_token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def new_runner(model: PreTrainedModel, limits: BatchLimits) -> Runner:
    """The runner of a model, chosen as `new_decoder` chooses.

    Raises:
        ValueError: a cache too small for one sequence of a useful length, or a model that keeps no
            keys and values.
    """
    levels = model_levels(model) if limits.levels else None
    if levels is not None:
        for name in levels.table.names:
            choose_level(model, name)
    ways: list[dict[str, Any]] = []
    if model.device.type == "cuda":
        ways = prepare(model, row_numbers(limits.max_rows), levels, limits.cache_bytes)
    reason = recordable(model)
    if reason is None:
        return PlanRunner(read_parts(model), levels, limits, tuple(ways))
    return TransformersRunner(model, reason, levels, limits)


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the cache for one token of one sequence."""
    use_device_order(model)
    if recordable(model) is None:
        return plan_token_bytes(read_parts(model))
    return measured_token_bytes(model)
