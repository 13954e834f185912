"""llama.cpp as a peer: the same Llama in BF16, Q8_0 and Q4_0, decoded with the same threads.

Needs llama-cpp-python, gguf, safetensors and torch; writes the weights of a Hugging Face directory
into GGUF files of the same shape. Only the time of a token counts, so queries and keys keep their
Hugging Face order (llama.cpp's own converter reorders them) and there is no vocabulary.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("BF16", "Q8_0", "Q4_0")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    index, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{index}.{NAMES[part]}.weight"


def write_gguf(model: Path, kind: str, file: Path) -> None:
    """The tensors of a Llama directory, matrices in ``kind``, vectors in float32."""
    gguf = importlib.import_module("gguf")
    numpy = importlib.import_module("numpy")
    safetensors = importlib.import_module("safetensors")
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    form = gguf.GGMLQuantizationType[kind]
    for shard in sorted(model.glob("*.safetensors")):
        with safetensors.safe_open(str(shard), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                weight = tensors.get_tensor(name).float().numpy()
                if weight.ndim == 1:
                    writer.add_tensor(gguf_name(name), weight.astype(numpy.float32))
                else:
                    data = gguf.quants.quantize(weight, form)
                    writer.add_tensor(gguf_name(name), data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_file(file: Path, context: int, tokens: int, threads: int) -> float:
    """Median tokens per second of single-token steps behind a prompt."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    model = llama_cpp.Llama(
        str(file),
        n_ctx=context + tokens + 8,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    model.eval([1 + i % 1000 for i in range(context)])
    seconds = []
    for token in range(tokens):
        start = time.perf_counter()
        model.eval([1 + token % 1000])
        seconds.append(time.perf_counter() - start)
    model.close()
    return 1 / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="directory of a dense Llama")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder that keeps the GGUF files")
    options = parser.parse_args()
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            file = (options.work or Path(folder)) / f"{kind}.gguf"
            if not file.exists():
                write_gguf(options.model, kind, file)
            speeds[kind] = time_file(file, options.context, options.tokens, options.threads)
            print(f"llama.cpp {kind}: {speeds[kind]:.1f} tokens/s", flush=True)
            if options.work is None:
                file.unlink()
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
