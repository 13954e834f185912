"""Weights and inputs of the reference model sparse together: 40 % of both.

Protocol: one sequence per story with <s>, every token sparse and scored, the first 100 stories
(dense 3.7276). SparseGPT with TEAL's uniform thresholds has 10.66 there, and 8.21 with weights that
aim at the dense model's output.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation.gates import Gates
from prune_llm.activation.measure import GatedModel
from prune_llm.activation.search import matching_sparsity
from prune_llm.calibration import cut_windows, load_tokenizer, read_documents, tokenize

SEPARATOR = "<|story|>"


def test_both_sparsities_at_once(reference: Path, tmp_path: Path) -> None:
    texts, model_dir = reference / "text", reference / "stories260k"
    config = PruneConfig(
        pattern="0.4",
        target="dense",
        calibration=str(texts / "stories_calib.txt"),
        separator=SEPARATOR,
        samples=96,
        seq_len=512,
        sampling="first",
    )
    prune(model_dir, config, tmp_path / "pruned")
    tokenizer = load_tokenizer(model_dir)
    calibration, _ = tokenize(
        read_documents(str(texts / "stories_calib.txt"), SEPARATOR), tokenizer
    )
    windows_ST = cut_windows(calibration, 512, "stories_calib")[:96]
    gated = GatedModel.of(prune_llm.load(tmp_path / "pruned"), "magnitude")
    gated.first_dense = 0
    quantiles, last_ST = gated.quantiles(windows_ST), windows_ST[80:]

    def thresholds(share: float) -> list[float]:
        return quantiles.thresholds([share] * len(gated.sites))

    share = matching_sparsity(lambda s: gated.measure(last_ST, thresholds(s)).sparsity, 0.4)
    stories = read_documents(str(texts / "stories_eval.txt"), SEPARATOR)[:100]
    ids = [torch.tensor(tokenizer(story)["input_ids"])[None] for story in stories]
    assert _perplexity(gated, ids, gated.dense)[0] <= 5.5
    ppl, sparsity = _perplexity(gated, ids, thresholds(share))
    assert sparsity >= 0.395
    assert ppl <= 7.6  # found: 7.53; the target was 8.2


@torch.inference_mode()
def _perplexity(
    gated: GatedModel, ids: list[torch.Tensor], thresholds: list[float]
) -> tuple[float, float]:
    gates = Gates(gated.sites, gated.scales, thresholds, first_dense=0)
    nll, tokens = 0.0, 0
    with gates:
        for ids_1T in ids:
            logits_TV = gated.model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
            nll += float(functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum"))
            tokens += ids_1T.shape[1] - 1
    return math.exp(nll / tokens), gates.sparsity
