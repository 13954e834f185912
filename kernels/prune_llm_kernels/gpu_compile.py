"""What the GPU kernels compile to: registers, spills and instructions, without a GPU.

    python -m prune_llm_kernels.gpu_compile --architectures 80 90

Triton compiles for an architecture ahead of time with the assembler that it carries. An instruction
count is of the inner loop and per weight position, kept or not: what decides whether a kernel keeps
up with memory. A GPU's budget is its instructions per clock over the positions it can read per
clock; BUDGETS has those of density 0.5 in bfloat16, a position being 9.17 bits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100)
# 128 instructions a clock and multiprocessor / positions a clock at the measured read bandwidth
BUDGETS = {80: 11.0, 86: 22.0, 89: 47.0, 90: 8.9}
_POINTERS = {
    "x": "*bf16", "listed": "*i32", "listed_x": "*bf16", "counts": "*i32", "data": "*bf16",
    "words": "*i32", "starts": "*i32", "weight": "*bf16", "dense": "*bf16", "partials": "*fp32",
    "bias": "*bf16", "second_bias": "*bf16", "third_bias": "*bf16", "y": "*bf16",
    "second_y": "*bf16", "third_y": "*bf16", "thresholds": "*fp32", "scales": "*fp32",
    "totals": "*i64",
}  # fmt: skip
# arguments of the 8B shapes that are multiples of 16, as Triton finds out at a launch
_ROUND = ("columns", "outputs", "width", "second", "third")


@dataclass(frozen=True)
class Case:
    """A kernel as it is compiled for a batch."""

    kernel: str
    rows: int
    listed: bool = True


@dataclass(frozen=True)
class Count:
    """What one case became."""

    kernel: str
    rows: int
    listed: bool
    architecture: int
    registers: int
    spilled: int  # bytes of local memory of a thread
    shared: int  # bytes of a program
    loop: int  # instructions of the inner loop
    per_position: float  # of them for each weight position of a thread


CASES = (
    Case("packed_linear", 1),
    Case("packed_linear", 1, listed=False),
    Case("packed_linear", 2),
    Case("packed_linear", 4),
    Case("packed_matmul", 16, listed=False),
    Case("dense_linear", 1),
    Case("dense_linear", 4),
    Case("unpack", 1),
    Case("list_channels", 1),
    Case("finish_linears", 1),
    Case("finish_swiglu", 1),
)


def constants(case: Case, block: int = 512) -> dict[str, Any]:
    """The compile-time arguments and num_warps of a case, as gpu.py launches it."""
    import torch

    from prune_llm_kernels import gpu
    from prune_llm_kernels.gpu_ops import CHUNK

    packed: dict[str, Any] = gpu.packed_config(case.rows, block)
    packed |= {"CHUNK": CHUNK, "BLOCK": block, "LISTED": case.listed, "EVEN": True}
    rows = {"B": packed["B"], "CHUNK": CHUNK}
    dense = {**gpu.dense_config(case.rows), "CHUNK": CHUNK, "BLOCK": gpu.DENSE_BLOCK}
    return {
        "packed_linear": {**packed, "NATIVE": True, "LOAD": gpu.load_code(torch.bfloat16, block)},
        "packed_matmul": {**packed, "NATIVE": True},
        "dense_linear": {**dense, "LISTED": case.listed, "EVEN": True},
        "unpack": {"STEP": 4, "BLOCK": block, "NATIVE": True, "num_warps": block // 128},
        "list_channels": {**rows, "SCALED": True, "TOTAL": True},
        "finish_linears": {**rows, "BIASED": False, "ADD": True},
        "finish_swiglu": {**rows, "BIASED": False, "SCALED": True, "LIST": True, "TOTAL": True},
    }[case.kernel]


def compile_case(case: Case, architecture: int) -> Any:
    """Triton's compiled kernel: its `asm` and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prune_llm_kernels import gpu_triton

    kernel = getattr(gpu_triton, case.kernel)
    fixed = constants(case)
    warps = fixed.pop("num_warps", 4)
    names = kernel.arg_names
    if case.rows == 1 and "rows" in names:
        fixed["rows"] = 1  # a launch takes an argument of 1 for a constant
    signature = {
        name: "constexpr" if name in fixed else _POINTERS.get(name, "i32") for name in names
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned for i, name in enumerate(names) if name in _POINTERS or name in _ROUND
    }
    source = ASTSource(kernel, signature, fixed, attributes)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def count(case: Case, architecture: int) -> Count:
    """Compile a case and read what it became."""
    compiled = compile_case(case, architecture)
    fixed = constants(case)
    usage = resources(compiled.asm["cubin"])
    loops = list(inner_loops(disassembly(compiled.asm["cubin"])))
    longest = max((len(loop) for loop in loops), default=0)
    threads = 32 * fixed.get("num_warps", 4)
    positions = fixed.get("STEP", 1) * fixed.get("BLOCK", threads) / threads
    shared = compiled.metadata.shared
    return Count(
        case.kernel, case.rows, case.listed, architecture, *usage, shared, longest,
        round(longest / positions, 2),
    )  # fmt: skip


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its local memory."""
    text = _tool("cuobjdump", "-res-usage", cubin)
    registers = re.search(r"REG:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    assert registers and stack, text
    return int(registers[1]), int(stack[1])


def disassembly(cubin: bytes) -> list[str]:
    """Labels and instructions in their order."""
    text = _tool("nvdisasm", "-c", cubin)
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if re.match(r"\.L_|/\*[0-9a-f]{4,}\*/", line)]


def loops(lines: list[str]) -> Iterator[tuple[int, int]]:
    """First and last line of each loop."""
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    for i, line in enumerate(lines):
        branch = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i - 2:  # the last is a branch to itself
            yield labels[branch[1]], i


def inner_loops(lines: list[str]) -> Iterator[list[str]]:
    """The instructions of each loop that contains no other."""
    spans = list(loops(lines))
    for start, end in spans:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            yield [line for line in lines[start : end + 1] if line.startswith("/*")]


def main_loop(lines: list[str], load: str) -> list[str]:
    """The instructions of the smallest loop that has most of the ``load``."""
    spans = [[line for line in lines[s : e + 1] if line.startswith("/*")] for s, e in loops(lines)]
    most = max(sum(load in line for line in span) for span in spans)
    holding = [span for span in spans if 2 * sum(load in line for line in span) > most]
    return min(holding, key=len)


def instructions(lines: list[str], load: str) -> float:
    """Instructions of the main loop for each ``load``, one a weight."""
    loop = main_loop(lines, load)
    return len(loop) / sum(load in line for line in loop)


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What a program that comes with Triton prints about a cubin."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [program, option, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the GPU kernels; print JSON lines.")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--kernels", nargs="+", help="only these")
    parser.add_argument("--rows", type=int, nargs="+", help="only for these batches")
    options = parser.parse_args()
    for case in CASES:
        if case.kernel in (options.kernels or [case.kernel]) and case.rows in (
            options.rows or [case.rows]
        ):
            for architecture in options.architectures:
                print(json.dumps(asdict(count(case, architecture))), flush=True)


if __name__ == "__main__":
    main()
