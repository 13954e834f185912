"""Time and peak GPU memory of pruning a random-weight Llama: one JSON line for each method.

The checkpoint, its tokenizer and the text are made as in `bench_prune.py`; the clock runs from the
call until the pruned checkpoint is on disk and verified. The default is the 8B shape with 128
samples of 2048 tokens, for a GPU; making it takes 32 GB of memory and 16 GB of disk.

Example::

    python eval/bench/bench_prune_gpu.py
    python eval/bench/bench_prune_gpu.py --tiny --device cpu  # checks the script, measures nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_prune import make_model, make_text, make_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "8B": {
        "hidden": 4096,
        "intermediate": 14336,
        "blocks": 32,
        "heads": 32,
        "kv_heads": 8,
        "vocab": 128256,
        "samples": 128,
        "seq_len": 2048,
    },
    "tiny": {
        "hidden": 64,
        "intermediate": 96,
        "blocks": 2,
        "heads": 4,
        "kv_heads": 2,
        "vocab": 64,
        "samples": 4,
        "seq_len": 32,
    },
}
METHODS = ("wanda", "sparsegpt")
# seconds that the 8B shape may take on an H200, and bytes of GPU memory
TARGETS = {"wanda": 120, "sparsegpt": 300}
GPU_BYTES = 24e9


def measure(work: Path, method: str, shape: str, device: str) -> dict[str, Any]:
    """Prune once; what it took."""
    from prune_llm import PruneConfig, prune
    from prune_llm.config import select_device
    from prune_llm.report import restart_peak_memory

    sizes = SHAPES[shape]
    config = PruneConfig(
        method=method,
        calibration=str(work / "text.txt"),
        samples=sizes["samples"],
        seq_len=sizes["seq_len"],
        device=device,
    )
    restart_peak_memory(select_device(device))
    report = prune(work / "model", config, work / method)
    found: dict[str, Any] = {
        "shape": shape,
        "method": method,
        "seconds": report.seconds,
        "peak_memory": report.peak_memory,
        "predicted": report.predicted,
        "sparsity": report.sparsity,
        "environment": report.environment,
    }
    if shape == "8B" and "gpu" in report.peak_memory:
        found["within_seconds"] = report.seconds < TARGETS[method]
        found["within_24_gb"] = report.peak_memory["gpu"] < GPU_BYTES
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    from prune_llm.config import select_device

    try:
        select_device(args.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    shape = "tiny" if args.tiny else "8B"
    sizes = SHAPES[shape]
    with tempfile.TemporaryDirectory(prefix="bench-prune-gpu-") as directory:
        work = Path(directory)
        (work / "model").mkdir()
        make_model(work / "model", argparse.Namespace(**sizes, dtype="bfloat16"))
        make_tokenizer(work / "model", sizes["vocab"])
        tokens = sizes["samples"] * sizes["seq_len"]
        make_text(work / "text.txt", sizes["vocab"], 2 * tokens)
        for method in args.methods:
            print(json.dumps(measure(work, method, shape, args.device)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
