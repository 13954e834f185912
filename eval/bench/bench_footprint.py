"""Memory and disk of a pruning run: what is foreseen before the work, beside what is measured.

Writes a random-weight Llama checkpoint of a given shape, a shard a block and never more than one
tensor of it in memory, prunes it in a fresh process and prints both. Memory is the highest
``VmHWM`` of the process; disk is what lies beside the output, the output included, looked at
twenty times a second.

Example::

    PYTHONPATH=.:kernels:eval python eval/bench/bench_footprint.py --shape 7b --blocks 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_prune import cpu_model, make_text, make_tokenizer

# hidden, intermediate, heads, key and value heads, blocks, vocabulary
SHAPES = {
    "tiny": (256, 688, 4, 4, 4, 4096),
    "300m": (1024, 2816, 16, 16, 24, 32000),
    "1b": (2048, 5632, 32, 4, 22, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
}
OPTIONS = ("method", "pattern", "target", "refine", "reconstruction", "activations")
INTERVAL = 0.05

CHILD = """
import json, sys
from prune_llm import PruneConfig, prune
model, output, config = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
report = prune(model, PruneConfig(**config), output, on_note=lambda t: print(t, file=sys.stderr))
print(json.dumps({"predicted": report.predicted, "peak": report.peak_memory["process"],
                  "seconds": report.seconds}))
"""


def write_model(directory: Path, shape: str, blocks: int | None) -> None:
    """config.json, a shard for each block and one for the rest, all in bfloat16."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, inner, heads, kv_heads, count, vocab = SHAPES[shape]
    count = blocks or count
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    kv = hidden // heads * kv_heads
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    torch.manual_seed(0)

    def random(*size: int) -> Any:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02)

    where: dict[str, str] = {}
    for index in range(count + 1):
        if index == count:
            tensors = {
                "model.embed_tokens.weight": random(vocab, hidden),
                "lm_head.weight": random(vocab, hidden),
                "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            }
        else:
            prefix = f"model.layers.{index}."
            tensors = {f"{prefix}{n}.weight": random(*size) for n, size in linears.items()}
            ones = torch.ones(hidden, dtype=torch.bfloat16)
            tensors |= {f"{prefix}{name}.weight": ones.clone() for name in norms}
        file = f"model-{index + 1:05d}-of-{count + 1:05d}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    make_tokenizer(directory, vocab)


def on_disk(folder: Path, name: str) -> int:
    """Bytes beside an output and in it."""
    total = 0
    for top in (folder / name, folder / f".{name}.partial"):
        for base, _, files in os.walk(top):
            for file in files:
                try:
                    total += Path(base, file).lstat().st_size
                except FileNotFoundError:
                    continue
    return total


def measured(work: Path, config: dict[str, Any], threads: int) -> dict[str, Any]:
    """One run in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", CHILD, str(work / "model"), str(work / "out")]
    disk = 0
    with subprocess.Popen(
        [*command, json.dumps(config)], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        while run.poll() is None:
            disk = max(disk, on_disk(work, "out"))
            time.sleep(INTERVAL)
        assert run.stdout is not None
        text = run.stdout.read()
    if run.returncode != 0:
        raise SystemExit(f"the run failed: {run.returncode}")
    shutil.rmtree(work / "out")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return {**found, "disk": disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="300m")
    parser.add_argument("--blocks", type=int, help="of the model; all where not given")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work-dir", type=Path, help="where the temporary folder goes")
    parser.add_argument(
        "--run",
        action="append",
        help="options of a run, such as 'method=sparsegpt,target=dense'; repeatable",
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-footprint-", dir=args.work_dir))
    try:
        (work / "model").mkdir()
        write_model(work / "model", args.shape, args.blocks)
        vocab = SHAPES[args.shape][-1]
        make_text(work / "text.txt", vocab, args.samples * args.seq_len)
        print(f"{cpu_model()}; {args.shape}, blocks {args.blocks or 'all'}, {args.samples} samples "
              f"of {args.seq_len} tokens")  # fmt: skip
        print("| run | memory foreseen | measured | ratio | disk foreseen | measured | ratio |")
        print("|---|---|---|---|---|---|---|")
        for text in args.run or ["method=wanda", "method=sparsegpt"]:
            options = dict(part.split("=", 1) for part in text.split(","))
            assert set(options) <= set(OPTIONS), f"known options: {', '.join(OPTIONS)}"
            config = {
                "calibration": str(work / "text.txt"), "samples": args.samples,
                "seq_len": args.seq_len, "device": "cpu", **options,
            }  # fmt: skip
            found = measured(work, config, args.threads)
            memory, disk = found["predicted"]["memory"], found["predicted"]["disk"]
            peak, most = found["peak"], found["disk"]
            print(f"| {text} | {memory / 1e9:.2f} GB | {peak / 1e9:.2f} GB | "
                  f"{memory / peak:.2f} | {disk / 1e9:.2f} GB | {most / 1e9:.2f} GB"
                  f" | {disk / most:.2f} |", flush=True)  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
