"""The engine process: what of a GPU it uses, and what it does before the first request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_llm.segments import BatchLimits, Ran, Segment
from prune_llm_server.worker import _affordable, _warm_up


class Counting:
    """A runner that remembers how many rows of which levels were run together."""

    name, shares, piece, vocabulary, context, pages = "counting", True, 1, 9, 64, 99
    levels, draws = ("dense", "40%"), False

    def __init__(self, warm_rows: tuple[int, ...]) -> None:
        self.limits, self.warm_rows = BatchLimits(max_rows=8), warm_rows
        self.runs: list[tuple[int, set[str | None]]] = []

    def run(self, segments: list[Segment]) -> Ran:
        rows = sum(len(segment.tokens) for segment in segments)
        self.runs.append((rows, {segment.level for segment in segments}))
        wanted = sum(segment.wanted for segment in segments)
        return Ran(torch.zeros(wanted, 9), lambda: [None] * len(segments))

    def leave(self, slot: int) -> None:
        pass


def test_every_number_of_rows_runs_before_the_first_request() -> None:
    runner = Counting((1, 2, 3, 4, 6, 8))
    _warm_up(runner)
    for rows in runner.warm_rows:
        # compiled, recorded, replayed
        assert runner.runs.count((rows, {"dense"})) >= 3
    assert (2, {"dense", "40%"}) in runner.runs
    plain = Counting(())
    _warm_up(plain)
    assert {rows for rows, _ in plain.runs} == {2}


def test_the_cache_of_a_gpu_is_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    model: Any = SimpleNamespace(config=config, device=torch.device("cuda", 1))
    free = {torch.device("cuda", 1): 8000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 10**12))
    assert _affordable(1, model, BatchLimits(max_rows=1000)) == 2000
    assert _affordable(1, model, BatchLimits(max_rows=1, page_size=16)) == min(2000, 4096 + 16)
