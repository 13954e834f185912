"""GPU kernels: checked against float64, then timed beside cuBLAS, torch's 2:4 and a compiled step.

    python kernels/bench/bench_gpu.py --out eval/reports/gpu     writes gpu.json and gpu.md
    python kernels/bench/bench_gpu.py --dry-run                  tiny, on the CPU, without a GPU

Weights are random, made on the device, and rotate over copies that exceed the second cache; a CUDA
graph holds at least 32 calls; figures are medians of replays with their 10th and 90th percentile.
Bytes are those of the channels that were read; their share is of the read bandwidth measured in the
same run. A step is a whole decode step of 8B's shapes over the plan, attention and head included.
What fails its check stops the run. Every section has its seconds, all together end in under ten
minutes; what there is no time or package for is listed at the end, and results are written after
every section.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gpu_checks import check_kernels
from gpu_products import bench_products
from gpu_report import markdown, targets
from gpu_run import DRY, REAL, Run, about, bandwidth
from gpu_steps import Baselines, bench_dense, bench_peer, bench_steps, compile_peer

from prune_llm_kernels import gpu


def measure(run: Run, out: Path) -> None:
    """All sections, what matters most first."""
    setting, baselines, read = run.setting, Baselines(), 0.0
    with run.section("check"):
        check_kernels(run)
    with run.section("read"):
        read = bandwidth(run)
    write(run, out)
    if not read:
        raise SystemExit("the read bandwidth could not be measured: nothing can be compared")
    with run.section("products"):
        bench_products(run, read, setting.batches[:1], setting.cases, peer=True)
    write(run, out)
    with run.section("peer"):
        bench_dense(run, read, baselines)
        bench_peer(run, read, baselines, compile_peer if setting.on_gpu else lambda peer: peer)
    write(run, out)
    with run.section("steps"):
        bench_steps(run, read, baselines)
    write(run, out)
    with run.section("batches"):
        bench_products(run, read, setting.batches[1:], setting.many, peer=True)
    write(run, out)


def write(run: Run, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "about": run.about,
        "targets": targets(run),
        "rows": run.rows,
        "left_out": run.left_out,
    }
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    out.with_suffix(".md").write_text("\n".join(markdown(run)) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="path without its ending")
    parser.add_argument("--seconds", type=float, default=510, help="begin nothing after this")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, interpreted")
    options = parser.parse_args(arguments)
    setting = DRY if options.dry_run else REAL
    if setting.on_gpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry-run tries the script without one")
    if gpu.native() != setting.on_gpu:
        raise SystemExit("a dry run needs TRITON_INTERPRET=1, a GPU must not have it")
    torch.manual_seed(0)
    run = Run(setting, time.monotonic() + options.seconds, about(setting))
    try:
        measure(run, options.out)
    finally:  # what stops the run is no reason to lose what was found
        write(run, options.out)


if __name__ == "__main__":
    main()
