"""What the GPU kernels compile to, without a GPU: registers, spills, instructions in inner loops.

The bounds are what was reached, rounded up: a change of Triton or of a kernel that costs more shows
here. A process of its own compiles: in this one kernels are interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_llm_kernels.gpu_compile import ARCHITECTURES, inner_loops

# registers of a thread, instructions for each weight position; None: no loop over weights
BOUNDS: dict[tuple[str, int, bool], tuple[int, float | None]] = {
    ("packed_linear", 1, True): (64, 14.6),
    ("packed_linear", 1, False): (64, 13.9),
    ("packed_linear", 2, True): (80, 16.6),
    ("packed_linear", 4, True): (96, 20.4),
    ("packed_matmul", 16, False): (200, 15.2),
    ("dense_linear", 1, True): (64, 5.9),
    ("dense_linear", 4, True): (128, 11.8),
    ("unpack", 1, True): (48, None),
    ("list_channels", 1, True): (32, None),
    ("finish_linears", 1, True): (32, None),
    ("finish_swiglu", 1, True): (40, None),
}
SPILLED = 16  # bytes: four registers at most


def compiled(cache: Path, *options: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "prune_llm_kernels.gpu_compile", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("options", "cases"),
    [
        (["--architectures", "90"], len(BOUNDS)),
        (["--architectures", "80", "86", "89", "100", "--kernels", "dense_linear", "--rows", "1"],
         len(ARCHITECTURES) - 1),
    ],
    ids=["every kernel", "every architecture"],
)  # fmt: skip
def test_registers_and_instructions(options: list[str], cases: int, tmp_path: Path) -> None:
    found = compiled(tmp_path, *options)
    assert len(found) == cases
    for row in found:
        registers, instructions = BOUNDS[row["kernel"], row["rows"], row["listed"]]
        assert row["registers"] <= registers, row
        assert row["spilled"] <= SPILLED, row
        assert row["shared"] <= 48 * 1024, row
        if instructions is not None:
            # fewer than two for a position would mean that the loop was not found
            assert 2 < row["per_position"] <= instructions, row


def test_the_loop_that_is_counted_is_the_inner_one() -> None:
    lines = [
        ".L_x_0:",
        "/*0000*/ FADD R1 ;",
        ".L_x_1:",
        "/*0010*/ FFMA R1 ;",
        "/*0020*/ FFMA R2 ;",
        "/*0030*/ @P0 BRA `(.L_x_1) ;",
        "/*0040*/ @P1 BRA `(.L_x_0) ;",
        ".L_x_2:",
        "/*0050*/ BRA `(.L_x_2) ;",
    ]
    assert list(inner_loops(lines)) == [[lines[3], lines[4], lines[5]]]
