"""The benchmark of levels: what drafting costs, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_modules import eval_bench
from tiny_models import PROMPT, add_levels, llama_config, save_model

import prune_llm
from prune_llm.decoder import PlanDecoder, new_decoder


@pytest.fixture
def bench() -> Iterator[Any]:
    with eval_bench("bench_levels") as module:
        yield module


def test_what_drafting_costs(bench: Any, tmp_path: Path) -> None:
    model = prune_llm.load(save_model(tmp_path / "model", llama_config()))
    level = add_levels(model).levels[-1].name
    new_decoder(model, 64, level)  # puts the weights into the order that levels need
    decoder = new_decoder(model, 64)
    assert isinstance(decoder, PlanDecoder)
    decoder.prefill(PROMPT)
    found = bench.drafting(decoder, level, len(PROMPT))
    assert [row["drafted"] for row in found] == list(range(1, bench.MOST_ROWS))
    assert all(row["verify"] > 0 and row["draft_step"] > 0 for row in found)
