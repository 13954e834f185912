"""Activation sparsity on the reference model, by the protocol of peer_values.json: one sequence per
story with <s>, every token sparse and scored, float32; here on the first stories only.

The published uniform thresholds are quantiles of one side of each distribution, ours are of the
magnitudes. At equal realised sparsity the perplexities agree within 0.1 % at 24 and 39 %; at 49 %
the published ones are 1 % better (7.00 and 7.08), because one side of the first block's inputs
happens to give its sensitive sites a little less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import prune_llm
from prune_llm.activation.gates import Gates, score
from prune_llm.activation.measure import GatedModel
from prune_llm.activation.quantiles import Quantiles
from prune_llm.calibration import cut_windows, load_tokenizer, read_documents, tokenize

SEPARATOR = "<|story|>"
STORIES = 40
# planned sparsity of every site -> realised sparsity and perplexity on the stories
UNIFORM = {0.0: (0.0, 3.7517), 0.25: (0.2471, 3.9274), 0.5: (0.4954, 7.3041)}


@pytest.fixture(scope="module")
def gated(reference: Path) -> GatedModel:
    model = prune_llm.load(reference / "stories260k", dtype=torch.float32)
    return GatedModel.of(model, "magnitude")


@pytest.fixture(scope="module")
def stories(reference: Path) -> list[Tensor]:
    tokenizer = load_tokenizer(reference / "stories260k")
    documents = read_documents(str(reference / "text" / "stories_eval.txt"), SEPARATOR)
    return [torch.tensor(tokenizer(text)["input_ids"])[None] for text in documents[:STORIES]]


@pytest.fixture(scope="module")
def quantiles(reference: Path, gated: GatedModel) -> Quantiles:
    documents = read_documents(str(reference / "text" / "stories_calib.txt"), SEPARATOR)
    ids, _ = tokenize(documents, load_tokenizer(reference / "stories260k"))
    return gated.quantiles(cut_windows(ids, 512, "stories_calib")[:48])


@torch.inference_mode()
def scored(
    gated: GatedModel, stories: list[Tensor], thresholds: list[float]
) -> tuple[float, float]:
    """Realised sparsity and perplexity."""
    gates = Gates(gated.sites, gated.scales, thresholds, first_dense=0)
    nll, tokens = 0.0, 0
    with gates:
        for ids_1T in stories:
            logits = gated.model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
            nll += float(functional.cross_entropy(logits, ids_1T[0, 1:], reduction="sum"))
            tokens += ids_1T.shape[1] - 1
    return gates.sparsity, math.exp(nll / tokens)


@pytest.mark.parametrize("share", list(UNIFORM))
def test_uniform(
    share: float, gated: GatedModel, stories: list[Tensor], quantiles: Quantiles
) -> None:
    thresholds = quantiles.thresholds([share] * len(gated.sites))
    sparsity, ppl = scored(gated, stories, thresholds)
    realised, expected = UNIFORM[share]
    assert sparsity == pytest.approx(realised, abs=2e-3)
    # sums in another order move inputs across their threshold
    assert ppl == pytest.approx(expected, rel=0.005)


@torch.inference_mode()
def test_one_threshold_for_all_tokens_beats_the_largest_of_each_token(
    gated: GatedModel, stories: list[Tensor], quantiles: Quantiles
) -> None:
    """Per-token top-k, the reference method, at the same share: worse by far (5.13 to 4.69)."""
    share, some = 0.4, stories[:10]
    _, static = scored(gated, some, quantiles.thresholds([share] * len(gated.sites)))
    modules = [module for site in gated.sites for module in site.modules]
    handles = [module.register_forward_pre_hook(top_k(share)) for module in modules]
    try:
        _, per_token = scored(gated, some, gated.dense)
    finally:
        for handle in handles:
            handle.remove()
    assert per_token > 1.04 * static


def top_k(share: float) -> Callable[..., Tensor]:
    """A hook that keeps the largest inputs of every token."""

    def hook(_module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0]
        kept = round(x.shape[-1] * (1 - share))
        places = score(x, None).topk(kept, dim=-1).indices
        return torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))

    return hook
