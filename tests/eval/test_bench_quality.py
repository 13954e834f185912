"""The quality benchmark: its order, its arithmetic, its texts; and the texts its models learn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_modules import eval_bench

WIKI = " = A = \n\n one \n = = Part = = \n two \n = B = \n three \n = C = \n four \n"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with eval_bench("bench_quality") as module:
        yield module


@pytest.fixture(scope="module")
def train(bench: Any) -> Any:
    return sys.modules["train_sizes"]


def row(config: str, calibration: str, kl: float, cpu_s: float, seed: int = 0) -> dict[str, Any]:
    scores = {"dense_token_ppl": 2.0, "token_ppl": 3.0, "kl": kl}
    return {
        "model": "small", "calibration": calibration, "pattern": "0.5", "config": config,
        "seed": seed, "samples": 2, "seq_len": 8, "windows": 2, "steps": 1, "rate": 0.5,
        "cpu_s": cpu_s,
        "domains": {"stories": scores, "wiki": {**scores, "kl": 2 * kl}},
    }  # fmt: skip


def test_articles_are_cut_at_their_headings_only(train: Any) -> None:
    assert train.articles(WIKI) == [
        " = A = \n\n one \n = = Part = = \n two \n",
        " = B = \n three \n",
        " = C = \n four \n",
    ]


def test_half_of_every_batch_is_of_each_text(train: Any) -> None:
    config = train.TrainConfig(positions=4, batch_tokens=32, steps=5)
    batches = train.mixed((torch.zeros(100).long(), torch.ones(60).long()), config)
    for input_BT, label_BT in (found := list(islice(batches, 9))):
        assert input_BT.tolist() == [[0] * 4] * 4 + [[1] * 4] * 4
        assert torch.equal(input_BT, label_BT)
    assert len(found) == 5


def test_texts_share_no_article(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "wiki").write_text(WIKI)
    files = bench.write_texts(tmp_path / "wiki", tmp_path)
    calibration, evaluation = (
        files["wiki"][use].read_text() for use in ("calibration", "evaluation")
    )
    assert calibration == " = A = \n\n one \n = = Part = = \n two \n"
    assert calibration + evaluation == WIKI


def test_ratios_pair_rows_of_one_run(bench: Any) -> None:
    rows = [
        row("sparsegpt", "stories", 0.1, 2.0),
        row("sparsegpt", "wiki", 0.4, 4.0),
        row("alps", "wiki", 0.1, 12.0),
        row("alps", "stories", 0.2, 8.0),
        row("alps", "stories", 0.2, 8.0, seed=1),  # without a partner
    ]
    assert bench.ratios(rows, "alps", lambda row: row["cpu_s"]) == [3.0, 4.0]
    gain = bench.gain_table(rows).splitlines()
    assert gain[0] == "| configuration | small, same text | small, other text |"
    # same: stories on stories 2, wiki on wiki 0.25; other: the same, their KL being twice as large
    assert gain[3] == "| alps | 1.12 (0.25-2.00) | 1.12 (0.25-2.00) |"


def test_every_configuration_is_one(bench: Any) -> None:
    options = argparse.Namespace(
        pattern=["0.5", "2:4"], seed=[0, 3], calibration=["wiki"], model=[Path("a"), Path("b")],
        config=None, samples=4, seq_len=8, windows=2, steps=7, rate=0.25,
    )  # fmt: skip
    keys = list(bench.wanted(options))
    assert len({bench.key_of(key) for key in keys}) == len(keys)
    assert len(keys) == 2 * 2 * (len(bench.CONFIGS) + len(bench.MAIN))
    configs = [bench.prune_config(key, Path("text")) for key in keys]
    assert {config.sampling for config in configs if config.seed == 0} == {"first"}
    assert {config.sampling for config in configs if config.seed == 3} == {"random"}
    trained = {(config.reconstruction, config.reconstruction_steps) for config in configs}
    assert trained == {("none", None), ("block", 7), ("logits", 7)}
    rates = {config.reconstruction_rate for config in configs if config.reconstruction != "none"}
    assert rates == {0.25}
