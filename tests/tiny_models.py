"""Random models of any architecture, made on the fly, with a byte tokenizer and levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prune_llm.activation.gates import channel_scales
from prune_llm.activation.levels import Level, LevelTable
from prune_llm.activation.sites import find_sites


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 258 tokens: <s>, </s> and the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, **changes})


def save_model(
    directory: Path, config: Any, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """A random model of any architecture with the byte tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(directory, **settings)
    save_tokenizer(directory)
    return directory


PROMPT = list(b"the quick brown fox jumps over it")
MORE = list(b" and under the lazy dog, twice or thrice")


def add_levels(model: Any, criterion: str = "magnitude") -> LevelTable:
    """Thresholds at medians of what the sites see; as a checkpoint would bring them."""
    sites = find_sites(model)
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    table = LevelTable(criterion, tuple(site.site for site in sites), ())
    scales = channel_scales(model, table)
    hooks = []
    for site, scale in zip(sites, scales, strict=True):
        own = seen[site.name]

        def hook(_m: Any, args: Any, own: Any = own, scale: Any = scale) -> None:
            own.append((args[0].detach().abs().float() * (1 if scale is None else scale)).flatten())

        hooks.append(site.modules[0].register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPT + MORE]))
    for entry in hooks:
        entry.remove()
    # an expert that no token reached gets a threshold of 0.1
    found = [torch.cat(values) if values else torch.full((1,), 0.1) for values in seen.values()]
    levels = tuple(
        # off the values themselves: rounding would decide on which side they fall
        Level(f"{share:.0%}", tuple(1.0005 * float(v.quantile(share)) for v in found), share)
        for share in (0.3, 0.6)
    )
    table = LevelTable(criterion, table.sites, levels)
    model.__dict__.pop("_prune_llm_levels", None)
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings.settings["activation"] = table.to_json()
    else:
        model.config.quantization_config = {"activation": table.to_json()}
    return table
