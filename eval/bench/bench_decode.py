"""End-to-end decoding of a 1B-shaped Llama of random weights, pruned to 50 %, beside transformers.

    python eval/bench/bench_decode.py                   about ten minutes
    python eval/bench/bench_decode.py --blocks 4        a quick look
    python eval/bench/bench_decode.py --work DIR        keeps the models there and uses them again

The shape is TinyLlama's (hidden 2048, 22 blocks, SwiGLU 5632, 32 heads, 4 key-value heads, 32,000
tokens: 1.1 billion parameters); speed does not depend on the weights.
peer_llamacpp.py lets llama.cpp decode the same directory in BF16, Q8_0 and Q4_0.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from bench_prune import make_tokenizer
from rich.console import Console

from prune_llm import PruneConfig, prune
from prune_llm.cli_bench import print_speed
from prune_llm_eval.speed import SpeedConfig, measure

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def make_model(directory: Path, blocks: int, shape: dict[str, int] = SHAPE) -> Path:
    """Random bfloat16 weights of a Llama's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (directory / "config.json").exists():
        return directory
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=blocks))
    finally:
        torch.set_default_dtype(before)
    directory.mkdir(parents=True)
    model.save_pretrained(directory, max_shard_size="1GB")
    make_tokenizer(directory, shape["vocab_size"])
    return directory


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--blocks", type=int, default=22)
    add("--pattern", default="0.5")
    add("--contexts", type=int, nargs="+", default=[16, 512])
    add("--tokens", type=int, default=128)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, nargs="+", default=[])
    add("--work", type=Path, help="folder of the models; a temporary one if not given")
    add("--json", type=Path, help="also write the JSON line to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        dense = make_model(work / f"dense-{options.blocks}", options.blocks)
        packed = work / f"packed-{options.blocks}-{options.pattern.replace(':', 'of')}"
        if not packed.exists():
            prune(dense, PruneConfig(method="magnitude", pattern=options.pattern), packed)
        config = SpeedConfig(
            contexts=tuple(options.contexts),
            tokens=options.tokens,
            rounds=options.rounds,
            threads=tuple(options.threads),
        )
        report = measure(str(packed), str(dense), config, lambda *_: None)
        print_speed(Console(width=100), report)
        print(report.json_line())
        if options.json:
            options.json.write_text(report.json_line() + "\n")


if __name__ == "__main__":
    main()
