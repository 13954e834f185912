"""What decoding on an H200 should take, by arithmetic: no GPU is needed, none is measured.

    python kernels/bench/predict_gpu.py        writes eval/reports/gpu_decode_predicted_2026-11-29

Bytes are counted in really packed weights (a block of outputs of each shape; all blocks are alike),
instructions in the machine code that Triton and NVRTC make for sm_90, launches in a plan that runs
in Triton's interpreter; splits and grids are those that the kernels would be launched with. Speeds
of the GPU are those of shared notes; what it reaches of them is an estimate. `make bench-gpu`
measures the same cases.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the plan's kernels have no GPU

import argparse
import functools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases import parse_case
from gpu_cases import (
    LLAMA_8B,
    PREDICTED,
    RANDOM,
    WANDA,
    Sizes,
    channel_norms,
    limits,
    moved_bytes,
    random_inputs,
    random_weight,
    read_bytes,
    title,
)
from gpu_decoder import SITES, Decoder, random_layer
from gpu_launches import recorded_launches
from gpu_prediction import Counts, Device, Product, product
from gpu_prediction_report import SIZE, markdown, prediction

from prune_llm_kernels import gpu, gpu_cuda, gpu_layout, reference
from prune_llm_kernels.gpu_compile import disassembly, instructions, main_loop

ARCHITECTURE, DTYPE = 90, torch.bfloat16
# words of shared memory that a warp's 32 reads of two bytes take, simulated in the notes, section 4
WAVES = {0.5: 1.21, 0.7: 1.0}
# its plan launches for a block what one of 8B does
TINY = Sizes(256, 512, 8, 4, 128, 300, 2)


@dataclass(frozen=True)
class Case:
    """What is predicted: a case of gpu_cases, its masks and its batch."""

    name: str
    masks: str
    rows: int

    @property
    def title(self) -> str:
        return title(self.name, self.masks)


CASES = (
    Case("A50", RANDOM, 1),
    Case("W50", RANDOM, 1),
    Case("W70", RANDOM, 1),
    Case("W50A50", RANDOM, 1),
    Case("W50A50", WANDA, 1),
    Case("W50", RANDOM, 2),
    Case("W50", RANDOM, 4),
    Case("W50", RANDOM, 8),
)


def shapes() -> dict[str, tuple[int, int]]:
    return {**LLAMA_8B.shapes, "head": (LLAMA_8B.vocabulary, LLAMA_8B.hidden)}


@dataclass(frozen=True)
class Read:
    """Of one product: channels that count, bytes of them, and bytes that memory moves for them."""

    active: int
    loaded: int
    moved: int


def read(shape: tuple[int, int], case: str, masks: str) -> Read:
    """Counted in one packed block of outputs and in what is left behind the last whole one."""
    O, I = shape
    blocks, rest = divmod(O, gpu_layout.BLOCK)
    one = block_read(gpu_layout.BLOCK, I, case, masks)
    behind = block_read(rest, I, case, masks) if rest else Read(one.active, 0, 0)
    return Read(one.active, blocks * one.loaded + behind.loaded, blocks * one.moved + behind.moved)


@functools.cache
def block_read(outputs: int, I: int, case: str, masks: str) -> Read:
    """Of a weight [outputs, I] and one row of inputs; the same at every call."""
    pruned, skipped = parse_case(case)
    torch.manual_seed(0)
    norms_I = channel_norms(I, masks)
    x_BI = random_inputs(1, norms_I, DTYPE)
    active_I = reference.counting(x_BI, limits(x_BI, skipped), None)[0]
    active = int(active_I.sum())
    if not pruned:
        return Read(active, active * outputs * SIZE, active * outputs * SIZE)
    weight_OI = random_weight(outputs, pruned, norms_I, DTYPE)
    packed = gpu_layout.pack_channels(reference.pack(weight_OI), gpu_layout.BLOCK)
    return Read(active, read_bytes(packed, active_I), moved_bytes(packed, active_I))


@functools.cache
def cuda_counts(rows: int, listed: bool) -> tuple[float, int, int]:
    """Of gpu_kernels.cu for each weight position: instructions; two-byte reads and shuffles among
    the instructions of the loop."""
    defined = gpu_cuda.definitions(DTYPE, rows, gpu_layout.BLOCK, listed)
    lines = disassembly(gpu_cuda.compile_source(defined, ARCHITECTURE))
    loop = main_loop(lines, "LDS.U16")
    reads, shuffles = (sum(op in line for line in loop) for op in ("LDS.U16", "SHFL"))
    return instructions(lines, "LDS.U16"), reads, shuffles


@functools.cache
def triton_counts() -> dict[str, float]:
    """Instructions of Triton's kernels for each weight position, compiled in a process that does
    not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "prune_llm_kernels.gpu_compile", "--kernels", "packed_linear",
               "packed_matmul", "dense_linear", "--architectures", str(ARCHITECTURE)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {f"{r['kernel']} {r['rows']} {r['listed']}": r["per_position"] for r in rows}


def counts(case: Case) -> Counts:
    """Of the kernel that gpu.py takes."""
    pruned, skipped = parse_case(case.name)
    if not pruned:
        return Counts(triton_counts()[f"dense_linear {case.rows} True"])
    if case.rows > gpu.SUMMED_ROWS:
        return Counts(triton_counts()["packed_matmul 16 False"])
    every, reads, shuffles = cuda_counts(case.rows, bool(skipped))
    return Counts(every, WAVES[pruned] + shuffles / reads)


def products(case: Case, device: Device) -> dict[str, Product]:
    pruned, skipped = parse_case(case.name)
    made = {}
    for name, shape in shapes().items():
        one = read(shape, case.name, case.masks)
        made[name] = product(
            shape, one.moved, one.active, counts(case), bool(skipped), not pruned, device
        )
    return made


@functools.cache
def launches(pruned: bool, gated: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a block, and of what follows the last, by name: from the plans of one and two layers."""
    one, two = (_plan_launches(replace(TINY, layers=n), pruned, gated) for n in (1, 2))
    block = two[: len(two) - len(one)]
    assert two == (*block, *one) and one[: len(block)] == block
    return block, one[len(block) :]


def _plan_launches(sizes: Sizes, pruned: bool, gated: bool) -> tuple[str, ...]:
    layers = [random_layer(sizes, 0.5 if pruned else 0.0, RANDOM, DTYPE)]
    head_VI = torch.randn(sizes.vocabulary, sizes.hidden).to(DTYPE)
    thresholds_SB = torch.full((len(SITES) * sizes.layers, 1), -1.0) if gated else None
    decoder = Decoder(sizes, layers, head_VI, 20, 1, thresholds_SB)
    with recorded_launches() as names:
        decoder.plan.run()
    return tuple(names)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=PREDICTED, help="path without its ending")
    options = parser.parse_args(arguments)
    device = Device()
    plans = {
        (pruned, gated): launches(pruned, gated)
        for pruned in (False, True)
        for gated in (False, True)
    }
    made = [(case.name, case.masks, case.rows, products(case, device)) for case in CASES]
    result = prediction(made, plans, device)
    result["loaded"] = [
        {
            "case": case.title,
            "rows": case.rows,
            "shape": name,
            **asdict(read(shape, case.name, case.masks)),
        }
        for case in CASES
        for name, shape in shapes().items()
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text("\n".join(markdown(result)) + "\n")


if __name__ == "__main__":
    main()
