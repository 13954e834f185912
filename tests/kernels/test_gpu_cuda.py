"""gpu_kernels.cu: run on the CPU lane by lane against float64, and compiled for every architecture.

Neither needs a GPU. What only a GPU can show is whether its memory orders as the kernel assumes;
kernels/bench/bench_gpu.py checks the results there first.
"""

import contextlib
import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import gpu, gpu_cuda, gpu_layout, reference
from prune_llm_kernels.gpu_compile import ARCHITECTURES, disassembly, instructions, resources
from prune_llm_kernels.gpu_ops import CHUNK

MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]
HERE = Path(__file__).parent
RUN = """
extern "C" void run(const u16* x, const int* listed, const int* counts, const u8* data,
                    const int* starts, float* partials, int rows, int columns, int outputs,
                    int per_split, int chunks, int blocks, int splits) {
  run_grid(blocks, splits, [=] {
    packed_linear(x, listed, counts, data, starts, partials, rows, columns, outputs, per_split,
                  chunks);
  });
}
"""
# dtype, rows, block, listed, outputs, inputs
CASES = [
    (torch.bfloat16, 1, 512, True, 700, 300),
    (torch.float16, 3, 256, False, 200, 384),
    (torch.bfloat16, 2, 1024, True, 70, 130),
    (torch.bfloat16, 4, 512, False, 512, 256),
]


def on_cpu(folder: Path, defined: dict[str, int]) -> ctypes.CDLL:
    """The kernel compiled for the CPU, behind the stand-in for CUDA."""
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(f'#include "cuda_on_cpu.h"\n#include "{gpu_cuda.SOURCE}"\n{RUN}')
    options = [f"-D{name}={value}" for name, value in defined.items()]
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", *options]
    done = subprocess.run(
        [*command, str(source), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lane_by_lane_it_is_the_product(
    case: tuple[torch.dtype, int, int, bool, int, int], make_weight: MakeWeight, tmp_path: Path
) -> None:
    dtype, rows, block, listed, O, I = case
    library = on_cpu(tmp_path, gpu_cuda.definitions(dtype, rows, block, listed))
    assert gpu_cuda.supports(dtype, rows, I, listed)
    for density in (0.5, 1.0, 0.02):
        weight, x = make_weight(O, I, density, dtype), torch.randn(rows, I).to(dtype)
        packed = gpu_layout.pack_channels(reference.pack(weight), block)
        assert packed.starts is not None
        channels = gpu.list_channels(x, torch.rand(rows), None) if listed else None
        lists = (x, x) if channels is None else (channels.listed_CN, channels.counts_C)
        inputs = x if channels is None else channels.x_CBN
        chunks = -(-I // CHUNK)
        for splits in {1, chunks}:
            out = torch.full((splits, rows, O), float("nan"))
            tensors = (inputs, *lists, packed.data, packed.starts, out)
            sizes = (rows, I, O, -(-chunks // splits), chunks, packed.tiles, splits)
            library.run(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), *sizes)
            kept = x.double()
            if channels is not None:
                kept = torch.zeros(rows, I).double()
                for chunk, count in enumerate(channels.counts_C.tolist()):
                    which = channels.listed_CN[chunk, :count].long()
                    kept[:, which] = channels.x_CBN[chunk, :, :count].double()
            bound = kept.abs() @ weight.double().abs().T
            error = (out.double().sum(0) - kept @ weight.double().T).abs()
            assert (error <= 2e-6 * bound + 1e-30).all()


# for every weight position of the inner loop, at most; registers of a thread, at most
BOUNDS = {1: (8.6, 64), 2: (9.6, 80), 4: (12.5, 128)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_everywhere_within_its_bounds(architecture: int) -> None:
    for rows, (most, registers) in BOUNDS.items():
        if rows > 1 and architecture != 90:
            continue
        defined = gpu_cuda.definitions(torch.bfloat16, rows, 512, True)
        cubin = gpu_cuda.compile_source(defined, architecture)
        used, spilled = resources(cubin)
        assert used <= registers and spilled == 0
        assert 4 < instructions(disassembly(cubin), "LDS.U16") <= most


@pytest.mark.parametrize(
    ("dtype", "block", "listed"),
    [(torch.float16, 256, True), (torch.float16, 1024, False), (torch.bfloat16, 512, False)],
    ids=str,
)
def test_other_variants_compile(dtype: torch.dtype, block: int, listed: bool) -> None:
    defined = gpu_cuda.definitions(dtype, 1, block, listed)
    assert resources(gpu_cuda.compile_source(defined, 90))[1] == 0


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"do not compile for sm_90: (.|\n)*error"):
        gpu_cuda.compile_source({"BLOCK": 0}, 90)


def test_what_the_kernel_leaves_to_triton() -> None:
    assert not gpu_cuda.supports(torch.float32, 1, 128, True)
    assert not gpu_cuda.supports(torch.bfloat16, 5, 128, True)
    assert not gpu_cuda.supports(torch.bfloat16, 1, 130, False)


class Driver:
    """In place of libcuda: reads the arguments of a launch as the driver would."""

    def __init__(self, tensors: int, sizes: int) -> None:
        self.kinds = [ctypes.c_void_p] * tensors + [ctypes.c_int] * sizes
        self.grid: tuple[int, ...] = ()
        self.values: list[int | None] = []

    def cuLaunchKernel(self, function: ctypes.c_void_p, *rest: object) -> int:
        *grid, _shared, _stream, arguments, _extra = rest
        assert isinstance(arguments, ctypes.Array)
        self.grid = tuple(int(str(size)) for size in grid)
        pairs = zip(self.kinds, arguments, strict=True)
        self.values = [kind.from_address(address).value for kind, address in pairs]
        return 0


def test_a_launch_hands_over_addresses_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(2, 3)
    monkeypatch.setattr(gpu_cuda, "_driver", lambda: driver)
    stream = type("Stream", (), {"cuda_stream": 7})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    tensors = torch.zeros(3), torch.zeros(2, dtype=torch.int32)
    gpu_cuda.launch(1234, (5, 6), tensors, (1, 2, 300))
    assert driver.grid == (5, 6, 1, 32 * gpu_cuda.WARPS, 1, 1)
    assert driver.values == [*(tensor.data_ptr() for tensor in tensors), 1, 2, 300]
