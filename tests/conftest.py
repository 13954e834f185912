"""Fixtures: tiny models made on the fly, their tokenizer, and the reference model where present."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# the GPU kernels run here without a GPU; what is compiled is compiled in a process of its own
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from hypothesis import settings
from tiny_models import llama_config, save_model

ROOT = Path(__file__).parents[1]
# time says nothing on a shared machine
settings.register_profile("prune_llm", deadline=None)
settings.load_profile("prune_llm")
REFERENCE = ROOT.parent / "shared" / "reference"


# minutes each: begun first, so that no process of `make test` is left alone with one of them
LONGEST = (
    "core/test_reference.py",
    "test_readme.py",
    "server/test_faults.py",
    "kernels/test_native.py",
    "core/test_interruption.py",
    "core/test_ranks.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in rank), LONGEST
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def reference() -> Path:
    """The reference model, texts and the peers' measured values."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference model is not beside this checkout")
    return REFERENCE


@pytest.fixture(scope="session")
def peer_values(reference: Path) -> dict[str, float]:
    rows = json.loads((reference / "peer_values.json").read_text())["weight_pruning"]
    return {row["run"]: row["token_ppl"] for row in rows}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), llama_config())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9000 bytes of text."""
    words = re.findall("[a-z0-9]+", "the quick brown fox jumps over a lazy dog while 42 eggs boil")
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (1800,), generator=generator).tolist()
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text(" ".join(words[i] for i in picks))
    return file


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Any]:
    """Run `prune-llm` in this process: cli("prune", ...) -> result with exit_code and output."""
    from click.testing import CliRunner

    from prune_llm.cli import main

    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])
