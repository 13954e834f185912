"""A model token by token: our plan over packed and dense weights, and transformers' generate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm.decoder import Decoder, PlanDecoder
from prune_llm.generation import decode, load_tokenizer
from prune_llm.parts import LinearPart, ModelParts, read_parts
from prune_llm.sampling import SamplingParams
from prune_llm_eval.clock import clock, read_all, threads_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DecodeRow:
    """End to end: tokens per second behind a prompt, and seconds until its first token.

    ``threads`` is None on a GPU.
    """

    context: int
    threads: int | None
    packed: float
    own_dense: float
    transformers: float
    packed_first: float
    transformers_first: float
    packed_bytes: int
    bandwidth: float

    @property
    def limit(self) -> float:
        return self.packed * self.packed_bytes / self.bandwidth

    @property
    def speed_up(self) -> float:
        return self.packed / self.transformers


def time_decoding(
    sparse: PreTrainedModel,
    dense: PreTrainedModel,
    context: int,
    tokens: int,
    rounds: int,
    buffer: Tensor,
) -> DecodeRow:
    """Greedy decoding behind a prompt of random tokens; the three take turns."""
    vocabulary = sparse.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(vocabulary, (context,), generator=generator).tolist()
    tokenizer = load_tokenizer(sparse)
    capacity = context + tokens
    parts = read_parts(sparse)
    packed, own_dense = PlanDecoder(parts, capacity), PlanDecoder(read_parts(dense), capacity)
    read = clock([partial(read_all, buffer)], buffer.device)
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "packed": lambda: time_plan(packed, ids, tokens, tokenizer),
        "own_dense": lambda: time_plan(own_dense, ids, tokens, tokenizer),
        "transformers": lambda: time_transformers(dense, [ids], tokens),
        "read": lambda: (read()[0], 0.0),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            timed = run()
            found[name] += [timed] if round_ else []  # the first round warms up
    first = {name: statistics.median(value for value, _ in found[name]) for name in runs}
    speed = {name: statistics.median(value for _, value in found[name]) for name in runs}
    return DecodeRow(
        context,
        threads_on(buffer.device),
        speed["packed"],
        speed["own_dense"],
        speed["transformers"],
        first["packed"],
        first["transformers"],
        step_bytes(parts, context + tokens // 2),
        buffer.nbytes / first["read"],
    )


def time_plan(decoder: Decoder, ids: list[int], tokens: int, tokenizer: Any) -> tuple[float, float]:
    """Seconds to the first token and tokens per second, drawing and decoding text included."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for piece in decode(decoder, ids, params, tokenizer, frozenset()):
        generation = piece.generation
    return generation.prefill_seconds, generation.tokens_per_second


def time_transformers(
    model: PreTrainedModel, prompts: list[list[int]], tokens: int
) -> tuple[float, float]:
    """The same for transformers' own `generate`; tokens per second of each of the prompts."""
    clock = _Clock()
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            torch.tensor(prompts, device=model.device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
    first, last = clock.times[1], clock.times[-1]
    return first - started, (tokens - 1) / (last - first)


class _Clock:
    """A streamer that notes when something arrives: the prompt, then every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def step_bytes(parts: ModelParts, context: int, rows: int = 1, active: float = 1.0) -> int:
    """Bytes that a step of some rows must read: weights once, each row's own keys and values.

    Args:
        context: tokens before, of each row.
        active: share of the blocks' weights whose inputs count.
    """
    linears: list[LinearPart] = []
    for block in parts.blocks:
        linears += [block.query, block.key, block.value, block.output]
        linears += [block.gate, block.up, block.down]
    weights = round(active * sum(linear.weight.nbytes for linear in linears))
    cached = sum(block.key.out_features + block.value.out_features for block in parts.blocks)
    cached *= rows * context * parts.embedding_VD.element_size()
    return weights + parts.head.weight.nbytes + cached
