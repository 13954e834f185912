"""Which code runs is chosen by name, never in silence."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prune_llm_kernels import BACKENDS, PackedWeight, cpu, dispatch, reference, sparse_linear

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    dispatch.backend_for.cache_clear()
    cpu.isa_index.cache_clear()
    yield
    dispatch.backend_for.cache_clear()
    cpu.isa_index.cache_clear()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "kernels"), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )


def test_import_loads_no_extension() -> None:
    done = python(
        "import sys, prune_llm_kernels\n"
        "loaded = [name for name in sys.modules if name.startswith('prune_llm_kernels')]\n"
        "assert not {name.split('.')[-1] for name in loaded} & {'_C', 'cpu', 'gpu'}, loaded"
    )
    assert done.returncode == 0, done.stderr


def test_missing_extension_says_how_to_build_it() -> None:
    code = (
        "import sys; sys.modules['prune_llm_kernels._C'] = None\n"
        "import torch; from prune_llm_kernels import dense_linear\n"
        "print(dense_linear(torch.ones(1, 2), torch.ones(1, 2)).item())"
    )
    failed = python(code)
    assert failed.returncode == 1
    assert "ImportError: the C++ kernels of prune_llm are not built; run" in failed.stderr
    asked = python(code, PRUNE_LLM_BACKEND="reference")
    assert (asked.returncode, asked.stdout) == (0, "2.0\n"), asked.stderr


def test_backends_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(9, 30) * (torch.rand(9, 30) < 0.5), torch.randn(2, 30)
    results = []
    for name in ("cpu", "reference"):
        monkeypatch.setenv("PRUNE_LLM_BACKEND", name)
        dispatch.backend_for.cache_clear()
        assert dispatch.backend_for("cpu").__name__ == BACKENDS[name]  # type: ignore[attr-defined]
        results.append(sparse_linear(x, reference.pack(weight)))
    torch.testing.assert_close(results[0], results[1])


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_LLM_BACKEND", "fast")
    with pytest.raises(ValueError, match="PRUNE_LLM_BACKEND is 'fast'; it must be one of"):
        reference.pack(torch.ones(1, 1))


def test_device_without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no kernel for device 'mps'; move the model to one of"):
        dispatch.backend_for("mps")
    for name, device in (("cpu", "cuda"), ("gpu", "cpu")):
        monkeypatch.setenv("PRUNE_LLM_BACKEND", name)
        with pytest.raises(ValueError, match=f"'{name}', which cannot run on device '{device}'"):
            dispatch.backend_for(device)


def test_cuda_tensors_choose_the_gpu_kernels() -> None:
    assert dispatch.backend_for("cuda").__name__ == BACKENDS["gpu"]  # type: ignore[attr-defined]


def test_missing_triton_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from prune_llm_kernels.dispatch import backend_for\n"
        "print(backend_for('cuda').__name__)"
    )
    failed = python(code)
    assert failed.returncode == 1
    assert "ImportError: the GPU kernels of prune_llm need triton; run" in failed.stderr
    asked = python(code, PRUNE_LLM_BACKEND="reference")
    assert (asked.returncode, asked.stdout) == (0, "prune_llm_kernels.reference\n"), asked.stderr


@pytest.mark.parametrize("isa", cpu.isa_names())
def test_instruction_set_by_environment(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_LLM_ISA", isa)
    assert cpu.isa_names()[cpu.isa_index()] == isa


def test_unsupported_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNE_LLM_ISA", "avx1024")
    packed = PackedWeight(
        torch.ones(1, 1, dtype=torch.uint8), torch.ones(1), torch.tensor([0, 1]), 1
    )
    with pytest.raises(ValueError, match=r"'avx1024'; this machine supports .*portable"):
        sparse_linear(torch.ones(1), packed)


def test_threads_are_torchs() -> None:
    assert cpu.thread_pool_name() == "openmp"
