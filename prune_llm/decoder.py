"""Running a model token by token: prompts through transformers, single tokens through a plan.

Models built of Llama's parts (parts.py) are recorded once as a plan of kernels over fixed buffers;
the recording is compared with the model itself before it is used. Everything else decodes through
transformers.

Shape letters: B = sequences, T = tokens, D = hidden size, H = query heads, K = key-value heads,
V = vocabulary, R = rotated part of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from prune_llm.attention import FastAttention
from prune_llm.fused_block import FusedBlock
from prune_llm.parts import BlockParts, LinearPart, ModelParts, NormPart, OtherParts, read_parts
from prune_llm_kernels import tokens
from prune_llm_kernels.kv_cache import KeyValueCache
from prune_llm_kernels.plan import AttentionStep, Plan, new_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECK_TOKENS = 9
# relative distance of logits that rounding explains, and a missing factor or part does not
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class Decoder(Protocol):
    """One sequence after another through a model."""

    name: str

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Start a sequence with its prompt; logits [V] of the next token."""

    def step(self, token: int) -> Tensor:
        """Add a token; logits [V] of the next one. Valid until the next call."""


def new_decoder(model: PreTrainedModel, capacity: int) -> Decoder:
    """The fastest decoder that computes what the model computes.

    Args:
        capacity: tokens of prompt and answer together that must fit.
    """
    reason = recordable(model)
    if reason is not None:
        return TransformersDecoder(model, reason)
    return PlanDecoder(read_parts(model), capacity)


def recordable(model: PreTrainedModel) -> str | None:
    """None if the model can be recorded and the recording was found to agree; else the reason.

    The comparison runs once for each model: some tokens through both.
    """
    known: dict[str, str | None] = model.__dict__.setdefault("_prune_llm_recordable", {})
    if "reason" not in known:
        try:
            _compare(model)
            known["reason"] = None
        except OtherParts as reason:
            known["reason"] = str(reason)
    return known["reason"]


class TransformersDecoder:
    """Any causal LM, by its own forward pass and its own cache."""

    def __init__(self, model: PreTrainedModel, reason: str) -> None:
        self.name = f"transformers ({reason})"
        self._model = model
        self._cache: Any = None

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self._cache = None
        return self._run(list(ids))

    def step(self, token: int) -> Tensor:
        return self._run([token])

    @torch.inference_mode()
    def _run(self, ids: list[int]) -> Tensor:
        input_ids = torch.tensor([ids], device=self._model.device)
        with FastAttention():
            output = self._model(
                input_ids=input_ids,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ValueError(
                f"{type(self._model).__name__}: keeps no key-value cache; call its own generate()"
            )
        logits_V: Tensor = output.logits[0, -1]
        return logits_V


# -- the plan -----------------------------------------------------------------------------------


class PlanDecoder:
    """Decodes one sequence by replaying a plan; the model's weights are used in place."""

    name = "prune_llm kernels"

    def __init__(self, parts: ModelParts, capacity: int) -> None:
        self._parts = parts
        first = parts.blocks[0]
        kv_heads = first.key.out_features // first.head_size
        self._caches = [
            KeyValueCache.allocate(1, kv_heads, capacity, first.head_size, parts.dtype)
            for _ in parts.blocks
        ]
        self._position_B = torch.zeros(1, dtype=torch.int64)
        self._length = 0
        self._angles = _angles(parts.model, self._caches[0].capacity)
        self._recording = _Recording(parts, self._caches, self._position_B, self._angles)

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> Tensor:
        """The whole prompt at once; its keys and values are kept.

        Raises:
            ValueError: no token, or more than fit.
        """
        if not 0 < len(ids) <= self._caches[0].capacity:
            raise ValueError(
                f"prompt of {len(ids)} tokens: must have between 1 and {self._caches[0].capacity}"
            )
        ids_BT = torch.tensor([list(ids)])
        hidden_D = self._run_fused(ids_BT) if self._fusible(len(ids)) else self._run_model(ids_BT)
        self._length = len(ids)
        logits_V: Tensor = self._parts.head(hidden_D[None])[0]
        return logits_V

    def _fusible(self, count: int) -> bool:
        whole = all(not 0 < block.window < count for block in self._parts.blocks)
        return whole and tokens.supports_rows(self._parts.embedding_VD)

    def _run_fused(self, ids_BT: Tensor) -> Tensor:
        """Hidden state [D] of the last token, block by block with our kernels."""
        parts, count = self._parts, ids_BT.shape[1]
        hidden_BTD = parts.embedding_VD[ids_BT]
        cosine_TR, sine_TR = self._angles
        angles = cosine_TR[None, :count], sine_TR[None, :count]
        for block, cache in zip(parts.model.base_model.layers, self._caches, strict=True):
            hidden_BTD = FusedBlock(block, partial(_keep, cache))(hidden_BTD, angles)
        norm = parts.norm
        return tokens.rms_norm(hidden_BTD[0, -1:], norm.weight, norm.eps)[0]

    def _run_model(self, ids_BT: Tensor) -> Tensor:
        """The same by the model's own forward pass."""
        from transformers import DynamicCache

        kept = DynamicCache()
        with FastAttention():
            output = self._parts.model.base_model(
                input_ids=ids_BT, past_key_values=kept, use_cache=True
            )
        for cache, layer in zip(self._caches, kept.layers, strict=True):
            cache.write(0, 0, layer.keys[0], layer.values[0])
        hidden_D: Tensor = output.last_hidden_state[0, -1]
        return hidden_D

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        recording = self._recording
        recording.x_BD[0] = self._parts.embedding_VD[token]
        self._position_B[0] = self._length
        recording.plan.run()
        self._length += 1
        return recording.logits_BV[0]


def _keep(cache: KeyValueCache, keys_BKTD: Tensor, values_BKTD: Tensor) -> None:
    cache.write(0, 0, keys_BKTD[0], values_BKTD[0])


class _Recording:
    """The plan of one decode step and the buffers it runs through."""

    def __init__(
        self,
        parts: ModelParts,
        caches: Sequence[KeyValueCache],
        positions_B: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> None:
        self._rows = len(positions_B)
        self._dtype = parts.dtype
        self._positions_B = positions_B
        self._slots_B = torch.arange(self._rows)
        self.plan: Plan = new_plan("cpu", parts.dtype)
        width = parts.embedding_VD.shape[1]
        self.x_BD = self._buffer(width)
        self._normed_BD = self._buffer(width)
        self.logits_BV = self._buffer(parts.head.out_features)
        first = parts.blocks[0]
        self._q_BI, self._out_BI = (self._buffer(first.query.out_features) for _ in range(2))
        self._k_BI, self._v_BI = (self._buffer(first.key.out_features) for _ in range(2))
        self._gate_BI, self._up_BI = (self._buffer(first.gate.out_features) for _ in range(2))
        for block, cache in zip(parts.blocks, caches, strict=True):
            self._attention(block, cache, angles)
            self._mlp(block)
        self._norm(parts.norm, self.x_BD, self._normed_BD)
        self._linears(self._normed_BD, [parts.head], [self.logits_BV])

    def _buffer(self, width: int) -> Tensor:
        return torch.zeros(self._rows, width, dtype=self._dtype)

    def _attention(
        self, block: BlockParts, cache: KeyValueCache, angles: tuple[Tensor, Tensor]
    ) -> None:
        size = block.head_size
        self._norm(block.input_norm, self.x_BD, self._normed_BD)
        q, k, v = self._q_BI, self._k_BI, self._v_BI
        self._linears(self._normed_BD, [block.query, block.key, block.value], [q, k, v])
        q_BHD, k_BKD, v_BKD, out_BHD = (
            tensor.view(self._rows, -1, size) for tensor in (q, k, v, self._out_BI)
        )
        if block.query_norm is not None:
            self._norm(block.query_norm, q_BHD, q_BHD)
        if block.key_norm is not None:
            self._norm(block.key_norm, k_BKD, k_BKD)
        step = AttentionStep(
            q_BHD,
            k_BKD,
            v_BKD,
            out_BHD,
            *angles,
            cache,
            self._slots_B,
            self._positions_B,
            block.scale,
            block.window,
        )
        self.plan.attention(step)
        self._linears(self._out_BI, [block.output], [self.x_BD], accumulate=True)

    def _mlp(self, block: BlockParts) -> None:
        self._norm(block.mlp_norm, self.x_BD, self._normed_BD)
        gate, up = self._gate_BI, self._up_BI
        self._linears(self._normed_BD, [block.gate, block.up], [gate, up])
        self.plan.silu_mul(gate, up, gate)
        self._linears(gate, [block.down], [self.x_BD], accumulate=True)

    def _norm(self, norm: NormPart, x: Tensor, out: Tensor) -> None:
        self.plan.rms_norm(x, norm.weight, norm.eps, out)

    def _linears(
        self, x_BI: Tensor, linears: list[LinearPart], outs: list[Tensor], accumulate: bool = False
    ) -> None:
        weights, biases = [p.weight for p in linears], [p.bias for p in linears]
        self.plan.linears(x_BI, weights, biases, outs, accumulate)


def _angles(model: PreTrainedModel, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, R] of every position, float32, as the model makes them."""
    with torch.no_grad():
        like = torch.zeros(1, 1, 1)
        cosine, sine = model.base_model.rotary_emb(like, torch.arange(positions)[None])
    return cosine[0].float().contiguous(), sine[0].float().contiguous()


def _compare(model: PreTrainedModel) -> None:
    """Raise OtherParts unless the plan's logits are the model's, up to rounding."""
    parts = read_parts(model)
    try:
        decoder = PlanDecoder(parts, _CHECK_TOKENS)
    except ValueError as error:
        raise OtherParts(str(error)) from None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(parts.embedding_VD.shape[0], (_CHECK_TOKENS,), generator=generator)
    decoder.prefill(ids[:-2].tolist())
    decoder.step(int(ids[-2]))
    found_V = decoder.step(int(ids[-1])).float()
    with torch.inference_mode():
        expected_V = model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].float()
    distance = float((found_V - expected_V).norm() / (expected_V - expected_V.mean()).norm())
    if not distance <= _CHECK_TOLERANCE[parts.dtype]:
        raise OtherParts(
            f"{type(model).__name__} computes something else: its logits differ by {distance:.2g}"
        )
