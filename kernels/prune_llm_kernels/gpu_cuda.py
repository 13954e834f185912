"""gpu_kernels.cu at run time: NVRTC compiles it, the CUDA driver starts it; no nvcc is needed.

torch for CUDA brings NVRTC. A kernel is compiled once for each dtype, batch and block that is used;
that takes about a second.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prune_llm_kernels.gpu_ops import CHUNK

SOURCE = Path(__file__).with_name("gpu_kernels.cu")
WARPS, STAGES, PARTS = 4, 2, 2
MAX_ROWS = 4  # whose sums a thread holds in registers
ARCHITECTURE = 80  # at least: copies from global to shared memory that do not wait
Launch = tuple[int, int]


def supports(dtype: torch.dtype, rows: int, in_features: int, listed: bool) -> bool:
    """Whether the kernel multiplies such inputs; Triton multiplies every one."""
    whole = listed or in_features % CHUNK == 0
    return dtype.itemsize == 2 and 0 < rows <= MAX_ROWS and whole


def definitions(dtype: torch.dtype, rows: int, block: int, listed: bool) -> dict[str, int]:
    """What the source is compiled with."""
    B = 1 << (rows - 1).bit_length()
    sizes = {"BLOCK": block, "B": B, "WARPS": WARPS, "STAGES": STAGES, "PARTS": PARTS}
    return {
        **sizes,
        "CHUNK": CHUNK,
        "LISTED": int(listed),
        "BFLOAT16": int(dtype is torch.bfloat16),
    }


def compile_source(defined: dict[str, int], architecture: int) -> bytes:
    """The cubin of gpu_kernels.cu for sm_<architecture>.

    Raises:
        ImportError: NVRTC is not installed.
        RuntimeError: the source does not compile; the message is NVRTC's.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    text = SOURCE.read_bytes()
    _succeed(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"", 0, None, None))
    options = [f"-D{name}={value}" for name, value in defined.items()]
    options.append(f"--gpu-architecture=sm_{architecture}")
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
        if failed:
            log = _read(nvrtc, program, "ProgramLog").decode().strip("\0\n")
            raise RuntimeError(f"the CUDA kernels do not compile for sm_{architecture}: {log}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _succeed(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _succeed(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _succeed(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library that torch for CUDA, or the package nvidia-cuda-nvrtc, has installed."""
    packages = importlib.util.find_spec("nvidia")
    folders = [] if packages is None else list(packages.submodule_search_locations or [])
    found = [file for folder in folders for file in sorted(Path(folder).glob("*/lib/libnvrtc.so*"))]
    for name in [*map(str, found), "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ImportError("NVRTC is not installed; run `pip install nvidia-cuda-nvrtc`")


@functools.cache
def kernel(device: torch.device, dtype: torch.dtype, rows: int, block: int, listed: bool) -> int:
    """The compiled kernel on a device, as the driver's handle."""
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compile_source(definitions(dtype, rows, block, listed), 10 * major + minor)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # torch's context is the current one from here on
        _driver_succeeds("cuModuleLoadData", ctypes.byref(module), cubin)
        _driver_succeeds("cuModuleGetFunction", ctypes.byref(function), module, b"packed_linear")
    assert function.value is not None
    return function.value


def launch(function: int, grid: Launch, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Start packed_linear on torch's stream; nothing waits for it."""
    values = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    numbers = [ctypes.c_int(size) for size in sizes]
    pointers = [ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in (*values, *numbers)]
    arguments = (ctypes.c_void_p * len(pointers))(*pointers)
    device = tensors[0].device
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    with torch.cuda.device(device):
        _driver_succeeds(
            "cuLaunchKernel", ctypes.c_void_p(function), *grid, 1, 32 * WARPS, 1, 1, 0, stream,
            arguments, None,
        )  # fmt: skip


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver_succeeds(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()}")
