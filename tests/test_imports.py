"""Importing is cheap: no heavy package, no GPU, no file, no network."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = [
    "transformers",
    "datasets",
    "accelerate",
    "fastapi",
    "uvicorn",
    "lm_eval",
    "vllm",
    "triton",
]


@pytest.mark.parametrize(
    "package", ["prune_llm", "prune_llm.cli", "prune_llm.demo", "prune_llm_kernels",
                "prune_llm_eval", "prune_llm_server"],
)  # fmt: skip
def test_import_is_cheap(package: str) -> None:
    code = (
        f"import sys, {package}; import torch; "
        f"print([m for m in {HEAVY} if m in sys.modules], torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
    assert done.stderr == ""


def test_public_names() -> None:
    import prune_llm

    assert callable(prune_llm.prune)
    from prune_llm.prune import prune

    assert prune_llm.prune is prune
    assert prune_llm.__version__.count(".") == 2
