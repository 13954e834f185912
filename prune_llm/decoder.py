"""Running a model token by token: prompts through transformers, single tokens through a plan.

Models built of Llama's parts (RMSNorm, rotary attention, SwiGLU: Llama, Mistral, Qwen2, Qwen3 and
their kin) are recorded once as a plan of kernels over fixed buffers; the recording is compared
with the model itself before it is used. Everything else decodes through transformers.

Shape letters: B = sequences, T = tokens, D = hidden size, H = query heads, K = key-value heads,
V = vocabulary, R = rotated part of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from prune_llm.attention import FastAttention
from prune_llm.sparse_linear import SparseLinear
from prune_llm_kernels import PackedWeight, dense_linear, sparse_linear
from prune_llm_kernels.kv_cache import MAX_HEAD_SIZE, KeyValueCache
from prune_llm_kernels.packed_weight import DTYPES
from prune_llm_kernels.plan import AttentionStep, Plan, new_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# rotary embeddings whose angles depend on the position alone, not on the length so far
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
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


class CannotRecord(Exception):
    """Why a model has no plan: it then decodes through transformers."""


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
        except CannotRecord as reason:
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


# -- what a recordable model is made of ------------------------------------------------------


@dataclass(frozen=True)
class LinearPart:
    """A weight [O, I], packed or dense, and its bias [O]."""

    weight: PackedWeight | Tensor
    bias: Tensor | None

    @property
    def out_features(self) -> int:
        weight = self.weight
        return weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, PackedWeight):
            return sparse_linear(x, self.weight, self.bias)
        return dense_linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class NormPart:
    """RMSNorm: weight [D] and the epsilon under the root."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class BlockParts:
    """One decoder block."""

    input_norm: NormPart
    query: LinearPart
    key: LinearPart
    value: LinearPart
    output: LinearPart
    query_norm: NormPart | None
    key_norm: NormPart | None
    mlp_norm: NormPart
    gate: LinearPart
    up: LinearPart
    down: LinearPart
    head_size: int
    scale: float
    window: int


@dataclass(frozen=True)
class ModelParts:
    """A model as the plan needs it; the tensors are the model's own."""

    model: PreTrainedModel
    embedding_VD: Tensor
    blocks: tuple[BlockParts, ...]
    norm: NormPart
    head: LinearPart

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype


def read_parts(model: PreTrainedModel) -> ModelParts:
    """Take a model apart. Raises CannotRecord, with the reason, where it has other parts."""
    base = model.base_model
    _expect_children(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
    _expect_children(model, {model.base_model_prefix, "lm_head"})
    rotary = (getattr(base.rotary_emb.config, "rope_parameters", None) or {}).get("rope_type")
    if rotary not in _FIXED_ROTARY:
        raise CannotRecord(f"rotary embedding of type {rotary}")
    embedding = base.embed_tokens.weight
    if type(base.embed_tokens) is not nn.Embedding or embedding.device.type != "cpu":
        raise CannotRecord(f"embedding {type(base.embed_tokens).__name__} on {embedding.device}")
    if embedding.dtype not in DTYPES:
        raise CannotRecord(f"weights of {embedding.dtype}")
    blocks = tuple(_read_block(block, model, i) for i, block in enumerate(base.layers))
    return ModelParts(
        model, embedding, blocks, _read_norm(base.norm), _read_linear(model.lm_head, "lm_head")
    )


def _read_block(block: Any, model: PreTrainedModel, index: int) -> BlockParts:
    norms = {"input_layernorm", "post_attention_layernorm"}
    _expect_children(block, {"self_attn", "mlp"} | norms)
    attention, mlp = block.self_attn, block.mlp
    _expect_children(
        attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, optional={"q_norm", "k_norm"}
    )
    _expect_children(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    if not isinstance(mlp.act_fn, _silu_classes()):
        raise CannotRecord(f"activation {type(mlp.act_fn).__name__}")
    if not attention.head_dim <= MAX_HEAD_SIZE:
        raise CannotRecord(f"heads of {attention.head_dim}")
    return BlockParts(
        input_norm=_read_norm(block.input_layernorm),
        query=_read_linear(attention.q_proj, "q_proj"),
        key=_read_linear(attention.k_proj, "k_proj"),
        value=_read_linear(attention.v_proj, "v_proj"),
        output=_read_linear(attention.o_proj, "o_proj"),
        query_norm=_read_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_read_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        mlp_norm=_read_norm(block.post_attention_layernorm),
        gate=_read_linear(mlp.gate_proj, "gate_proj"),
        up=_read_linear(mlp.up_proj, "up_proj"),
        down=_read_linear(mlp.down_proj, "down_proj"),
        head_size=attention.head_dim,
        scale=float(attention.scaling),
        window=_window(model.config, index),
    )


def _silu_classes() -> tuple[type[nn.Module], ...]:
    from transformers.activations import SiLUActivation

    return (nn.SiLU, SiLUActivation)


def _window(config: Any, index: int) -> int:
    """Tokens that a block's queries see; 0: all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return int(window or 0)
    if kinds[index] not in ("full_attention", "sliding_attention"):
        raise CannotRecord(f"attention of type {kinds[index]}")
    return int(window or 0) if kinds[index] == "sliding_attention" else 0


def _expect_children(
    module: nn.Module, names: set[str], optional: AbstractSet[str] = frozenset()
) -> None:
    found = {name for name, _ in module.named_children()} - optional
    if found != names:
        strange = sorted(found ^ names)
        raise CannotRecord(f"{type(module).__name__} differs from Llama's in {', '.join(strange)}")


def _read_norm(norm: nn.Module) -> NormPart:
    names = {name for name, _ in norm.named_parameters()}
    if names != {"weight"} or not hasattr(norm, "variance_epsilon"):
        raise CannotRecord(f"normalisation {type(norm).__name__}")
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return NormPart(weight, float(norm.variance_epsilon))  # type: ignore[arg-type]


def _read_linear(module: nn.Module, name: str) -> LinearPart:
    if hasattr(module, "_hf_hook"):
        raise CannotRecord(f"{name} is offloaded")
    if isinstance(module, SparseLinear):
        return LinearPart(module.packed_weight(), module._parameters["bias"])
    if type(module) is not nn.Linear:
        raise CannotRecord(f"{name} is a {type(module).__name__}")
    return LinearPart(module.weight, module.bias)


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
        self._recording = _Recording(parts, self._caches, self._position_B)

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> Tensor:
        """The whole prompt through the model's own forward pass; its keys and values are kept.

        Raises:
            ValueError: no token, or more than fit.
        """
        if not 0 < len(ids) <= self._caches[0].capacity:
            raise ValueError(
                f"prompt of {len(ids)} tokens: must have between 1 and {self._caches[0].capacity}"
            )
        from transformers import DynamicCache

        kept = DynamicCache()
        with FastAttention():
            output = self._parts.model.base_model(
                input_ids=torch.tensor([list(ids)]), past_key_values=kept, use_cache=True
            )
        for cache, layer in zip(self._caches, kept.layers, strict=True):
            cache.write(0, 0, layer.keys[0], layer.values[0])
        self._length = len(ids)
        logits_V: Tensor = self._parts.head(output.last_hidden_state[:, -1])[0]
        return logits_V

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        recording = self._recording
        recording.x_BD[0] = self._parts.embedding_VD[token]
        self._position_B[0] = self._length
        recording.plan.run()
        self._length += 1
        return recording.logits_BV[0]


class _Recording:
    """The plan of one decode step and the buffers it runs through."""

    def __init__(
        self, parts: ModelParts, caches: Sequence[KeyValueCache], positions_B: Tensor
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
        angles = _angles(parts.model, caches[0].capacity)
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
    """Raise CannotRecord unless the plan's logits are the model's, up to rounding."""
    parts = read_parts(model)
    try:
        decoder = PlanDecoder(parts, _CHECK_TOKENS)
    except ValueError as error:
        raise CannotRecord(str(error)) from None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(parts.embedding_VD.shape[0], (_CHECK_TOKENS,), generator=generator)
    decoder.prefill(ids[:-2].tolist())
    decoder.step(int(ids[-2]))
    found_V = decoder.step(int(ids[-1])).float()
    with torch.inference_mode():
        expected_V = model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].float()
    distance = float((found_V - expected_V).norm() / (expected_V - expected_V.mean()).norm())
    if not distance <= _CHECK_TOLERANCE[parts.dtype]:
        raise CannotRecord(
            f"{type(model).__name__} computes something else: its logits differ by {distance:.2g}"
        )
