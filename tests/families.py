"""Tiny random models of every family that is supported; README's table names exactly these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NEW_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
QKV = "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj"
LLAMA = (QKV, "self_attn.o_proj", "mlp.gate_proj,mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        label: in README's table.
        config: its class in transformers, and what it is given.
        sites: of the first block: kinds that read one input, an expert's index as "*".
        experts: where experts lie on disk: "apart", a matrix each, or "fused".
    """

    label: str
    config: str
    settings: dict[str, Any]
    sites: tuple[str, ...]
    experts: str = ""

    def make(self) -> Any:
        import transformers

        return getattr(transformers, self.config)(**self.settings)


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


MHA = _without(SIZES, "num_key_value_heads")
SMALL = _without(MHA, "intermediate_size")
MOE = {**SIZES, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"head_dim": 8, "sliding_window": 8}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "LlamaConfig", SIZES, LLAMA),
    "mistral": Family("Mistral", "MistralConfig", {**SIZES, "sliding_window": 8}, LLAMA),
    "qwen2": Family("Qwen2", "Qwen2Config", SIZES, LLAMA),
    "qwen3": Family("Qwen3", "Qwen3Config", {**SIZES, "head_dim": 8}, LLAMA),
    "gemma2": Family("Gemma 2", "Gemma2Config", {**SIZES, **WINDOW}, LLAMA),
    "gemma3": Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {**SIZES, **WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        LLAMA,
    ),
}
