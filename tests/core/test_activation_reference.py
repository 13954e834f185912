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
from prune_llm.activation import balance
from prune_llm.activation.allocation import uniform
from prune_llm.activation.curve import Task
from prune_llm.activation.gates import Gates, score
from prune_llm.activation.measure import GatedModel
from prune_llm.activation.quantiles import Quantiles
from prune_llm.calibration import cut_windows, load_tokenizer, read_documents, tokenize

SEPARATOR = "<|story|>"
STORIES = 40
# planned sparsity of every site -> realised sparsity and perplexity on the stories
UNIFORM = {0.0: (0.0, 3.7517), 0.25: (0.2471, 3.9274), 0.5: (0.4954, 7.3041)}

# realised sparsity -> published perplexity, and what global planned for every linear, a row a block
BY_LINEAR = {
    0.241: (3.871, [
        0.420, 0.329, 0.264, 0.346, 0.194, 0.169, 0.303,
        0.291, 0.305, 0.161, 0.284, 0.184, 0.186, 0.359,
        0.307, 0.241, 0.199, 0.331, 0.188, 0.201, 0.358,
        0.303, 0.247, 0.132, 0.221, 0.169, 0.169, 0.343,
        0.283, 0.176, 0.139, 0.266, 0.145, 0.150, 0.343,
    ]),
    0.392: (4.514, [
        0.572, 0.451, 0.293, 0.498, 0.299, 0.293, 0.445,
        0.495, 0.423, 0.228, 0.400, 0.336, 0.324, 0.523,
        0.534, 0.363, 0.273, 0.486, 0.329, 0.341, 0.540,
        0.534, 0.426, 0.293, 0.388, 0.323, 0.335, 0.501,
        0.486, 0.322, 0.268, 0.457, 0.302, 0.308, 0.533,
    ]),
    0.491: (6.158, [
        0.637, 0.399, 0.294, 0.524, 0.355, 0.355, 0.552,
        0.595, 0.508, 0.346, 0.520, 0.435, 0.426, 0.621,
        0.640, 0.453, 0.331, 0.592, 0.433, 0.443, 0.620,
        0.629, 0.533, 0.335, 0.483, 0.453, 0.449, 0.611,
        0.591, 0.490, 0.409, 0.561, 0.443, 0.445, 0.639,
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def gated(reference: Path) -> GatedModel:
    model = prune_llm.load(reference / "stories260k", dtype=torch.float32)
    return GatedModel.of(model, "magnitude")


@pytest.fixture(scope="module")
def stories(reference: Path) -> list[Tensor]:
    tokenizer = load_tokenizer(reference / "stories260k")
    documents = read_documents(str(reference / "text" / "stories_eval.txt"), SEPARATOR)
    return [torch.tensor(tokenizer(text)["input_ids"])[None] for text in documents]


@pytest.fixture(scope="module")
def quantiles(gated: GatedModel, windows_ST: Tensor) -> Quantiles:
    return gated.quantiles(windows_ST[:48])


@pytest.fixture(scope="module")
def windows_ST(reference: Path) -> Tensor:
    documents = read_documents(str(reference / "text" / "stories_calib.txt"), SEPARATOR)
    ids, _ = tokenize(documents, load_tokenizer(reference / "stories260k"))
    return cut_windows(ids, 512, "stories_calib")[:96]


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
    sparsity, ppl = scored(gated, stories[:STORIES], thresholds)
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


def test_a_threshold_for_each_linear_reaches_the_published_levels(
    reference: Path, gated: GatedModel, stories: list[Tensor], windows_ST: Tensor
) -> None:
    """All stories, at no less realised sparsity and no more perplexity than TEAL's greedy levels;
    the sparsities are those that the search found (log of 2026-11-21), written down here."""
    by_linear = GatedModel.of(gated.model, "magnitude", granularity="linear")
    quantiles = by_linear.quantiles(windows_ST)
    for least, (published, shares) in BY_LINEAR.items():
        realised, ppl = scored(by_linear, stories, quantiles.thresholds(shares))
        assert least <= realised <= least + 0.001
        assert ppl <= published


def test_global_gains_on_text_it_did_not_see(
    gated: GatedModel, quantiles: Quantiles, windows_ST: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search itself, from uniform, on a thirtieth of its tokens."""
    monkeypatch.setattr(balance, "greedy", lambda task: uniform(task))
    monkeypatch.setattr(balance, "ROUNDS", 2)
    monkeypatch.setattr(balance, "ROUND_TOKENS", 1)
    monkeypatch.setattr(balance, "LEAST_TOKENS", 1024)
    curve = balance.balance(Task(gated, quantiles, windows_ST[:8], (0.49,)))
    unseen_ST = windows_ST[48:64]
    same = gated.measure(unseen_ST, quantiles.thresholds([0.495] * len(gated.sites)))
    found = gated.measure(unseen_ST, quantiles.thresholds(curve.at(0.49)))
    # a percent of sparsity costs about 9 % of the KL
    gain = math.log(same.kl / found.kl) + 9 * (found.sparsity - same.sparsity)
    assert abs(found.sparsity - same.sparsity) < 0.01 and gain > 0.05


def top_k(share: float) -> Callable[..., Tensor]:
    """A hook that keeps the largest inputs of every token."""

    def hook(_module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0]
        kept = round(x.shape[-1] * (1 - share))
        places = score(x, None).topk(kept, dim=-1).indices
        return torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))

    return hook
