"""The serving benchmark: its arithmetic, and its client against the real server."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "eval" / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Its modules find each other as they do when the script runs."""
    sys.path.insert(0, str(BENCH))
    try:
        import bench_serve
        import serve_client
        import serve_faults
        import serve_process

        yield type("Bench", (), {
            "serve": bench_serve, "client": serve_client,
            "faults": serve_faults, "process": serve_process,
        })  # fmt: skip
    finally:
        sys.path.remove(str(BENCH))


def reply(bench: Any, prompt: int, started: float, pieces: list[float], text: str = "x") -> Any:
    tokens = 2 * len(pieces)
    return bench.client.Reply(
        prompt, started, pieces[-1] + 0.5, 200, text, pieces, tokens, 10, 4, "length", "", ""
    )


def test_percentiles_lie_between_neighbours(bench: Any) -> None:
    percentile = bench.client.percentile
    assert percentile([4, 1, 3, 2], 0.5) == 2.5
    assert percentile([1, 2, 3, 4, 5], 0.95) == pytest.approx(4.8)
    assert percentile([7, math.nan], 0.95) == 7
    assert math.isnan(percentile([], 0.5)) and math.isnan(percentile([math.nan], 0.5))


def test_times_of_a_reply(bench: Any) -> None:
    one = reply(bench, 0, 10.0, [10.25, 10.5, 11.0, 12.0])  # 8 tokens in 4 pieces
    assert one.first_token_seconds == 0.25 and one.seconds == 2.5
    assert one.token_seconds == pytest.approx(1.75 / 7)
    assert bench.client.tokens_until(one, 10.5) == 4 and bench.client.tokens_until(one, 99) == 8
    one.tokens = 1
    assert math.isnan(one.token_seconds)


def test_summary_counts_tokens_within_the_window_only(bench: Any) -> None:
    load = bench.client.Load(2, 100.0, 110.0, cut=1)
    load.replies = [
        reply(bench, 0, 100.0, [101.0, 102.0], "right"),
        reply(bench, 1, 104.0, [109.0, 111.0], "mixed"),
        reply(bench, 2, 104.0, [107.0, 108.0], "not asked alone"),
        bench.client.Reply(3, 105.0, 106.0, 429, error="status 429: full"),
    ]
    found = bench.client.summary(load, {0: "right", 1: "alone"})
    assert found["tokens_per_second"] == (4 + 2 + 4) / 10
    assert (found["whole"], found["checked"], found["mismatches"], found["cut"]) == (3, 2, 1, 1)
    assert found["errors"] == {"status 429: full": 1} and found["cached_share"] == 0.4
    assert found["ttft_p50"] == 3.0 and found["e2e_p50"] == 4.5  # of 1, 3, 5; of 2.5, 4.5, 7.5
    assert found["tpot_p95"] == pytest.approx((1 / 3) + 0.9 * (1 / 3))  # of 1/3, 1/3, 2/3


def test_a_stream_without_its_end_is_not_whole(bench: Any) -> None:
    one = bench.client.Reply(0, 0.0)
    one.take({"choices": [{"text": "half"}]}, 1.0)
    one.judge()
    assert one.error == "the stream ended early" and one.pieces == [1.0]
    one = bench.client.Reply(0, 0.0)
    one.take({"error": {"message": "the engine died"}}, 1.0)
    one.judge()
    assert one.error == "error event: the engine died"


def test_slope_and_table(bench: Any) -> None:
    assert bench.process.slope([(0, 5.0), (1, 7.0), (2, 9.0)]) == pytest.approx(2.0)
    rows = []
    for round_, speed in enumerate((20.0, 40.0)):
        for server, factor in (("ours", 1.0), ("peer", 0.5)):
            load = bench.client.Load(1, 0.0, 1.0, [reply(bench, 0, 0.0, [0.1, 0.2])])
            figures = {**bench.client.summary(load, {}), "tokens_per_second": speed * factor}
            rows.append({"server": server, "round": round_, **figures, "peak_rss": 1e9,
                         "peak_pss": 1e9})  # fmt: skip
    mine, peer = bench.serve.load_table(rows).splitlines()[2:]
    assert mine.startswith("| 1 | ours | 30.0 |  | 100 |")
    assert peer.startswith("| 1 | peer | 15.0 | 2.00x | 100 |")
    assert bench.serve.together(rows[::2])["whole"] == 2


def test_a_real_server(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_llm.demo import model_path

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    result = tmp_path / "result.json"
    common = ["bench_serve.py", str(model_path()), "--peers", "--threads", "1", "--tokens", "6",
              "--prompts", "6", "--lengths", "4", "12", "--json", str(result)]  # fmt: skip
    load = ["--concurrency", "3", "--seconds", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [*common, *load])
    bench.serve.main()
    (row,) = json.loads(result.read_text())["load"]
    assert row["whole"] == row["checked"] >= 3
    assert row["mismatches"] == row["cut"] == 0 and row["errors"] == {}
    assert row["completion_tokens"] == 6 * row["whole"]
    assert 0 < row["ttft_p50"] <= row["e2e_p50"] and row["peak_rss"] > 1e6


def test_clients_that_leave(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_llm.demo import model_path

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench_serve.py", str(model_path()), "--peers", "--threads", "1", "--tokens", "6"],
    )
    options = bench.serve.parse()
    prompts = bench.serve.Prompts(model_path(), bench.serve.default_text(), (4, 12))
    (kind,) = bench.serve.kinds_of(model_path(), tmp_path, options)
    stand = bench.serve.Stand(kind, prompts, 6, 60.0, tmp_path / "log")
    stand.alone = dict.fromkeys(range(4), "")

    async def run() -> dict[str, Any]:
        async with bench.process.serving(kind, tmp_path / "log") as server:
            found: dict[str, Any] = await bench.faults.aborts(server, stand, 20, 4)
            return found

    found = asyncio.run(run())
    assert sum(found["left"].values()) == 20 and found["stayed"]["errors"] == {}
    after = found["after"]
    assert (after["running"], after["waiting"], after["cache_held"]) == (0, 0, 0)
    assert after["descriptors"][1] <= after["descriptors"][0]
