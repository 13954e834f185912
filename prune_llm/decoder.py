"""Running a model token by token: prompts through transformers, single tokens through a plan.

Models built of Llama's parts (parts.py) are recorded once as a plan of kernels over fixed buffers;
the recording is compared with the model itself before it is used. Everything else decodes through
transformers.

Shape letters: B = sequences, T = tokens, D = hidden size, H = query heads, K = key-value heads,
V = vocabulary, R = rotated part of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from prune_llm.activation.decoding import ModelLevels, PlanGates, choose_level
from prune_llm.activation.levels import DENSE
from prune_llm.attention import FastAttention
from prune_llm.channel_linear import ChannelLinear, packed_linears, use_channels
from prune_llm.decode_statistics import DecodeStatistics
from prune_llm.fused_block import FusedBlock
from prune_llm.gpu_model import prepare
from prune_llm.parts import ModelParts, OtherParts, read_parts
from prune_llm.recording import Head, Recording, rotary_angles
from prune_llm.speculative import Draft, SpeculativeDecoder
from prune_llm.transformers_decoder import TransformersDecoder
from prune_llm_kernels import tokens
from prune_llm_kernels.kv_cache import KeyValueCache
from prune_llm_kernels.wide_products import WideProducts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECK_TOKENS = 9
# relative distance of logits that rounding explains, and a missing factor or part does not
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class Decoder(Protocol):
    """One sequence after another through a model."""

    name: str

    @property
    def device(self) -> torch.device: ...

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """Start a sequence with its prompt; logits [V] of the next token."""

    def step(self, token: int) -> Tensor:
        """Add a token; logits [V] of the next one. Valid until the next call."""

    def statistics(self) -> DecodeStatistics:
        """Of all steps since the decoder was made."""


def new_decoder(
    model: PreTrainedModel, capacity: int, level: str = DENSE, draft: Draft | None = None
) -> Decoder:
    """The fastest decoder that computes what the model computes.

    Args:
        capacity: tokens of prompt and answer together that must fit.
        level: of activation sparsity for every token behind the prompt. The first level that is
            not "dense" puts the model's weights into channel-major order, for good; on a GPU every
            level does.
        draft: propose tokens at another level and verify them at this one.

    Raises:
        ValueError: a level the model does not have, or a draft where none is possible.
    """
    levels = choose_level(model, level)
    if draft is not None:
        choose_level(model, draft.level)
    ways: list[dict[str, Any]] = []
    if model.device.type == "cuda":
        rows = (1,) if draft is None else (1, draft.tokens + 1)
        ways = prepare(model, rows, levels)
    reason = recordable(model)
    if reason is None:
        decoder = PlanDecoder(read_parts(model), capacity, levels, level, tuple(ways))
        return decoder if draft is None else SpeculativeDecoder(decoder, draft)
    if draft is not None:
        raise ValueError(
            f"draft_level {draft.level!r}: this model decodes through transformers ({reason}); "
            "leave the draft out"
        )
    return TransformersDecoder(model, reason, capacity, levels, level)


def use_device_order(model: PreTrainedModel) -> None:
    """On a GPU: packed weights into channel-major order, the only one it decodes, for good."""
    if model.device.type == "cuda":
        use_channels(model, packed_linears(model))


def recordable(model: PreTrainedModel) -> str | None:
    """None if the model can be recorded and the recording was found to agree; else the reason.

    The comparison runs once for each form of the model's weights: some tokens through both.
    """
    known: dict[bool, str | None] = model.__dict__.setdefault("_prune_llm_recordable", {})
    form = any(isinstance(module, ChannelLinear) for module in model.modules())
    if form not in known:
        try:
            _compare(model)
            known[form] = None
        except OtherParts as reason:
            known[form] = str(reason)
    return known[form]


# -- the plan -----------------------------------------------------------------------------------


class PlanDecoder:
    """Decodes one sequence by replaying a plan; the model's weights are used in place."""

    name = "prune_llm kernels"

    def __init__(
        self,
        parts: ModelParts,
        capacity: int,
        levels: ModelLevels | None = None,
        level: str = DENSE,
        ways: tuple[dict[str, Any], ...] = (),
    ) -> None:
        self.parts, self.levels, self.level, self.ways = parts, levels, level, ways
        first = parts.blocks[0]
        kv_heads = first.key.out_features // first.head_size
        self.caches = [
            KeyValueCache.allocate(
                1, kv_heads, capacity, first.head_size, parts.dtype, parts.device
            )
            for _ in parts.blocks
        ]
        self.length = 0  # tokens whose keys and values are valid
        self.angles = rotary_angles(parts.model, self.capacity)
        self.position_B = torch.zeros(1, dtype=torch.int64, device=parts.device)
        self.whole_step = self.record(self.position_B, level)

    def record(self, positions_B: Tensor, level: str) -> WholeStep:
        """A plan over this decoder's one sequence, at a level, for rows at the positions."""
        gates = None
        if self.levels is not None:
            gates = PlanGates(self.levels, len(positions_B), self.parts.device)
            for row in range(len(positions_B)):
                gates.choose(row, self.levels.table.level(level))
        pages_BN = torch.zeros_like(positions_B)[:, None].contiguous()
        blocks = Recording(self.parts, self.caches, pages_BN, positions_B, self.angles, gates)
        return WholeStep(blocks, Head(self.parts, blocks.x_BD, blocks.plan))

    @property
    def device(self) -> torch.device:
        return self.parts.device

    @property
    def capacity(self) -> int:
        return self.caches[0].page_size

    def statistics(self) -> DecodeStatistics:
        gates = self.whole_step.blocks.gates
        if gates is None:
            return DecodeStatistics(self.level, ways=self.ways)
        return DecodeStatistics(self.level, gates.active, gates.read, ways=self.ways)

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> Tensor:
        """The whole prompt at once; its keys and values are kept.

        Raises:
            ValueError: no token, or more than fit.
        """
        if not 0 < len(ids) <= self.capacity:
            raise ValueError(
                f"prompt of {len(ids)} tokens: must have between 1 and {self.capacity}"
            )
        ids_BT = torch.tensor([list(ids)], device=self.parts.device)
        hidden_D = self._run_fused(ids_BT) if self._fusible(len(ids)) else self._run_model(ids_BT)
        self.length = len(ids)
        logits_V: Tensor = self.parts.head(hidden_D[None])[0]
        return logits_V

    def _fusible(self, count: int) -> bool:
        whole = all(not 0 < block.window < count for block in self.parts.blocks)
        return whole and tokens.supports_rows(self.parts.embedding_VD)

    def _run_fused(self, ids_BT: Tensor) -> Tensor:
        """Hidden state [D] of the last token, block by block with our kernels."""
        parts, count = self.parts, ids_BT.shape[1]
        hidden_BTD = parts.embedding_VD[ids_BT]
        cosine_TR, sine_TR = self.angles
        angles = cosine_TR[None, :count], sine_TR[None, :count]
        for block, cache in zip(parts.model.base_model.layers, self.caches, strict=True):
            hidden_BTD = FusedBlock(block, partial(_keep, cache))(hidden_BTD, angles)
        norm = parts.norm
        return tokens.rms_norm(hidden_BTD[0, -1:], norm.weight, norm.eps)[0]

    def _run_model(self, ids_BT: Tensor) -> Tensor:
        """The same by the model's own forward pass."""
        from transformers import DynamicCache

        kept = DynamicCache()
        with FastAttention(), WideProducts():
            output = self.parts.model.base_model(
                input_ids=ids_BT, past_key_values=kept, use_cache=True
            )
        for cache, layer in zip(self.caches, kept.layers, strict=True):
            cache.write(0, 0, layer.keys[0], layer.values[0])
        hidden_D: Tensor = output.last_hidden_state[0, -1]
        return hidden_D

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        step = self.whole_step
        step.blocks.x_BD[0] = self.parts.embedding_VD[token]
        self.position_B[0] = self.length
        step.blocks.plan.run()
        self.length += 1
        return step.head.logits_BV[0]


@dataclass(frozen=True)
class WholeStep:
    """Blocks and head in one plan."""

    blocks: Recording
    head: Head


def _keep(cache: KeyValueCache, keys_BKTD: Tensor, values_BKTD: Tensor) -> None:
    cache.write(0, 0, keys_BKTD[0], values_BKTD[0])


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
        ids_BT = ids[None].to(model.device)
        expected_V = model(input_ids=ids_BT, logits_to_keep=1).logits[0, -1].float()
    distance = float((found_V - expected_V).norm() / (expected_V - expected_V.mean()).norm())
    if not distance <= _CHECK_TOLERANCE[parts.dtype]:
        raise OtherParts(
            f"{type(model).__name__} computes something else: its logits differ by {distance:.2g}"
        )
