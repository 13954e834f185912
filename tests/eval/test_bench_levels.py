"""The benchmark of levels: what drafting costs, on a tiny model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import PROMPT, add_levels, llama_config, save_model

import prune_llm
from prune_llm.decoder import PlanDecoder, new_decoder

BENCH = Path(__file__).parents[2] / "eval" / "bench"


@pytest.fixture
def bench() -> Iterator[Any]:
    """Its modules find each other as they do when the script runs."""
    sys.path.insert(0, str(BENCH))
    try:
        import bench_levels

        yield bench_levels
    finally:
        sys.path.remove(str(BENCH))


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
