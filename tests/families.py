"""Tiny random models of every family that is supported; README's table names exactly these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import save_model

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


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


MHA = _without(SIZES, "num_key_value_heads")
STATE = _without(MHA, "intermediate_size", "num_attention_heads", "max_position_embeddings")
LOCAL_MOE = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {**SIZES, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"head_dim": 8, "sliding_window": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DELTA = {
    "head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
MLA = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA2 = {
    "shared_intermediate_size": 24,
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}
QKV = "self_attn.q_proj,self_attn.k_proj,self_attn.v_proj"
LLAMA = (QKV, "self_attn.o_proj", "mlp.gate_proj,mlp.up_proj", "mlp.down_proj")
PHI = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
ATTENTION = LLAMA[:2]
APART = ("mlp.experts.*.gate_proj,mlp.experts.*.up_proj", "mlp.experts.*.down_proj")
FUSED = ("mlp.experts.*.gate_up_proj", "mlp.experts.*.down_proj")
SHARED = ("mlp.shared_expert.gate_proj,mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        label: in README's table.
        config: its class in transformers, and what it is given.
        sites: of the last block: kinds that read one input, an expert's index as "*".
        experts: how they lie on disk: "apart", a matrix each, "fused", or "" for none.
        dtype: on disk.
        ignore: linears that have to be left dense.
        exact: our blocks give transformers' own hidden states to the bit.
        notes: in README's table.
    """

    label: str
    config: str
    settings: dict[str, Any]
    sites: tuple[str, ...]
    experts: str = ""
    dtype: torch.dtype = torch.float32
    ignore: tuple[str, ...] = ()
    exact: bool = True
    notes: str = ""

    def row(self) -> str:
        """Of README's table."""
        experts = {"apart": "a matrix each", "fused": "one tensor", "": ""}[self.experts]
        exact = "yes" if self.exact else "rounding"
        return f"| {self.label} | yes | yes | yes | {exact} | {experts} | {self.notes} |"

    def make(self) -> Any:
        import transformers

        return getattr(transformers, self.config)(**self.settings)

    def save(self, directory: Path) -> Path:
        return save_model(directory, self.make(), self.dtype)


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
    "gemma3_vision": Family(
        "Gemma 3 with vision",
        "Gemma3Config",
        {
            "text_config": {**SIZES, **WINDOW},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 260,
        },
        LLAMA,
        notes="the decoder; vision stays dense",
    ),
    "phi3": Family("Phi-3", "Phi3Config", SIZES, PHI),
    "cohere": Family(
        "Cohere",
        "CohereConfig",
        SIZES,  # attention and MLP read the same normalised input
        (f"{QKV},mlp.gate_proj,mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"),
    ),
    "opt": Family(
        "OPT",
        "OPTConfig",
        {**_without(MHA, "intermediate_size"), "ffn_dim": 48, "word_embed_proj_dim": 32},
        (QKV, "self_attn.out_proj", "fc1", "fc2"),
    ),
    "gpt2": Family(
        "GPT-2",
        "GPT2Config",
        {**STATE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    "gpt_neox": Family(
        "GPT-NeoX",
        "GPTNeoXConfig",
        MHA,
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "falcon": Family(
        "Falcon",
        "FalconConfig",
        {**_without(MHA, "intermediate_size"), "alibi": True},
        (
            "self_attention.query_key_value,mlp.dense_h_to_4h",
            "self_attention.dense",
            "mlp.dense_4h_to_h",
        ),
    ),
    "bloom": Family(
        "BLOOM",
        "BloomConfig",
        {**STATE, "n_layer": 2, "n_head": 4},
        (
            "self_attention.query_key_value",
            "self_attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
    ),
    "mixtral": Family(
        "Mixtral",
        "MixtralConfig",
        {**LOCAL_MOE, "sliding_window": None},
        (*ATTENTION, "mlp.experts.*.w1,mlp.experts.*.w3", "mlp.experts.*.w2"),
        "apart",
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        {**MOE, "head_dim": 8},
        (*ATTENTION, *APART),
        "apart",
    ),
    "gpt_oss": Family(
        "gpt-oss",
        "GptOssConfig",
        {**LOCAL_MOE, **WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        (*ATTENTION, *FUSED),
        "fused",
        torch.bfloat16,
        notes="bf16; MXFP4 is refused",
    ),
    "llama4": Family(
        "Llama 4 (text)",
        "Llama4TextConfig",
        {
            **LOCAL_MOE,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 16,
        },
        (
            *ATTENTION,
            *(site.replace("mlp", "feed_forward") for site in (*FUSED, *SHARED)),
        ),
        "fused",
        exact=False,
        notes="transformers multiplies all experts by all tokens",
    ),
    "granitemoe": Family(
        "Granite MoE",
        "GraniteMoeConfig",
        LOCAL_MOE,
        (*ATTENTION, *(site.replace("mlp", "block_sparse_moe") for site in FUSED)),
        "fused",
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        "DeepseekV3Config",
        {**SIZES, **MLA},
        (
            "self_attn.q_a_proj,self_attn.kv_a_proj_with_mqa",
            "self_attn.q_b_proj",
            "self_attn.kv_b_proj",
            "self_attn.o_proj",
            *APART,
            *(site.replace("shared_expert", "shared_experts") for site in SHARED),
        ),
        "apart",
        torch.bfloat16,
        notes="latent attention, shared experts, dense first blocks",
    ),
    "qwen3_next": Family(
        "Qwen3-Next (linear attention)",
        "Qwen3NextConfig",
        {**MOE, **DELTA},
        (*ATTENTION, *SHARED, *APART),
        "apart",
    ),
    "granite_hybrid": Family(
        "Granite 4 hybrid (Mamba-2)",
        "GraniteMoeHybridConfig",
        {**LOCAL_MOE, **MAMBA2},
        (
            *ATTENTION,
            *(site.replace("mlp", "block_sparse_moe") for site in FUSED),
            "shared_mlp.input_linear",
            "shared_mlp.output_linear",
        ),
        "fused",
    ),
    "lfm2": Family(
        "LFM2 (convolutions)",
        "Lfm2Config",
        {**SIZES, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        (
            QKV,
            "self_attn.out_proj",
            "feed_forward.w1,feed_forward.w3",
            "feed_forward.w2",
        ),
    ),
    "mamba": Family(
        "Mamba",
        "MambaConfig",
        {**STATE, "state_size": 8},
        ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj"),
        ignore=("mixer.dt_proj",),
        notes="with `--ignore mixer.dt_proj`",
    ),
}
