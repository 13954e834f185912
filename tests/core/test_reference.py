"""The published implementations' perplexities on the reference model (peer_values.json).

Our masks are exact; theirs are not, in three ways that change a perplexity by more than 1 %:
they prune one weight more per group, Wanda floors the count of each row (0.6 of 64 is 38, which is
59.4 %), and a short last N:M group is zeroed whole. With their counting rules switched on (the
`peer_counts` fixture) every value is met within 1 %; ours are held as regression values beside.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_llm import PruneConfig, prune
from prune_llm.calibration import cut_windows, load_tokenizer, read_documents, tokenize
from prune_llm.masks import Pattern
from prune_llm.methods import sparsegpt
from prune_llm.presets import PRESETS
from prune_llm_kernels import cpu

SEPARATOR = "<|story|>"
# method, pattern, name in peer_values.json, our own value with exact counts
ROWS = [
    ("sparsegpt", "0.5", "sparsegpt-repo-unstructured", 17.340),
    ("sparsegpt", "0.6", "sparsegpt-repo-unstructured-0.6", 46.037),
    ("sparsegpt", "2:4", "sparsegpt-repo-2:4", 31.396),
    ("wanda", "0.5", "wanda-repo-wanda-unstructured", 19.095),
    ("wanda", "0.6", "wanda-repo-wanda-unstructured-0.6", 60.876),
    ("wanda", "2:4", "wanda-repo-wanda-2:4", 66.561),
    ("ria", "0.5", "ria-repo:ria-unstructured", 25.315),
    ("ria", "2:4", "ria-repo:ria-2:4", 77.908),
    ("magnitude", "0.5", "wanda-repo-magnitude-unstructured", 40.462),
    ("magnitude", "0.6", "wanda-repo-magnitude-unstructured-0.6", 78.937),
    ("magnitude", "2:4", "wanda-repo-magnitude-2:4", 118.280),
]
# N:M has no rounding, so there the peers' counts are ours; RIA's own are not imitated
UNSTRUCTURED = [row for row in ROWS if ":" not in row[1] and row[0] != "ria"]

# ADMM solvers rank weights that they moved: a damping changed by its millionth part moves the
# perplexity of ALPS by 1 to 2 %, so no value is nearer than that. At 60 % ours is the lower one.
ALPS = [
    ("0.5", "alps-repo:alps-unstructured", 0.02),
    ("0.6", "alps-repo:alps-unstructured-0.6", 0.03),
    ("2:4", "alps-repo:alps-2:4", 0.02),
]
# the authors' counts and masks: the final count, rounded down, from the first step on
ADMM = [("0.5", "admm-unstructured"), ("0.6", "admm-unstructured-0.6")]

# pattern, perplexity of `--quality balanced`, what the project asks of it; at 60 % 13.00, 4:8 9.83
BALANCED = [("0.5", 7.334, 9.0), ("2:4", 12.502, 15.0)]
DENSE_TARGET = [("sparsegpt", 9.005), ("wanda", 8.131)]


def row_id(row: tuple[str, str, str, float]) -> str:
    return f"{row[0]}-{row[1]}"


@pytest.fixture(scope="session")
def windows_ST(reference: Path) -> Tensor:
    documents = read_documents(str(reference / "text" / "stories_eval.txt"), SEPARATOR)
    ids, _ = tokenize(documents, load_tokenizer(reference / "stories260k"))
    return cut_windows(ids, 512, "stories_eval")


def perplexity(directory: Path, windows_ST: Tensor) -> float:
    from transformers import AutoModelForCausalLM

    from prune_llm_eval.perplexity import token_perplexity

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return token_perplexity(model, windows_ST).token_ppl


def pruned_perplexity(
    reference: Path,
    method: str,
    pattern: str,
    output: Path,
    windows_ST: Tensor,
    target: str = "pruned",
    **options: Any,
) -> float:
    config = PruneConfig(
        method=method,
        pattern=pattern,
        calibration=str(reference / "text" / "stories_calib.txt"),
        separator=SEPARATOR,
        samples=96,
        seq_len=512,
        sampling="first",
        device="cpu",
        format="dense",
        target=target,
        **options,
    )
    prune(reference / "stories260k", config, output)
    return perplexity(output, windows_ST)


def test_dense(reference: Path, peer_values: dict[str, float], windows_ST: Tensor) -> None:
    assert windows_ST.shape == (142, 512)
    value = perplexity(reference / "stories260k", windows_ST)
    assert round(value, 4) == peer_values["dense"] == 3.9103


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_exact_counts(
    row: tuple[str, str, str, float],
    reference: Path,
    peer_values: dict[str, float],
    windows_ST: Tensor,
    tmp_path: Path,
) -> None:
    method, pattern, peer, expected = row
    value = pruned_perplexity(reference, method, pattern, tmp_path / "out", windows_ST)
    # float32 sums in another order move a few ranks
    assert value == pytest.approx(expected, rel=0.005)
    if ":" in pattern:  # no rounding, so the counts are the same
        assert value == pytest.approx(peer_values[peer], rel=0.01)


@pytest.mark.parametrize(("method", "expected"), DENSE_TARGET)
def test_dense_target(
    method: str, expected: float, reference: Path, windows_ST: Tensor, tmp_path: Path
) -> None:
    """At 50 %, where the same methods reach 17.34 and 19.09 without it."""
    value = pruned_perplexity(reference, method, "0.5", tmp_path / "out", windows_ST, "dense")
    assert value == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("pattern", "expected", "target"), BALANCED)
def test_balanced(
    pattern: str,
    expected: float,
    target: float,
    reference: Path,
    windows_ST: Tensor,
    tmp_path: Path,
) -> None:
    value = pruned_perplexity(
        reference,
        pattern=pattern,
        output=tmp_path / "out",
        windows_ST=windows_ST,
        **PRESETS["balanced"],
    )
    assert value == pytest.approx(expected, rel=0.01) and value <= target


# steps a block, goal, perplexity at 50 % after `sparsegpt --target dense` (9.01), 48 samples
RECONSTRUCTED = [("block", 60, 5.901), ("logits", 24, 7.045)]


@pytest.mark.parametrize(("goal", "steps", "expected"), RECONSTRUCTED)
def test_reconstruction(
    goal: str, steps: int, expected: float, reference: Path, windows_ST: Tensor, tmp_path: Path
) -> None:
    """A small budget; what larger ones reach is in reconstruction_epyc_2026-11-21.md."""
    config = PruneConfig(
        calibration=str(reference / "text" / "stories_calib.txt"),
        separator=SEPARATOR,
        samples=48,
        seq_len=512,
        sampling="first",
        device="cpu",
        format="dense",
        target="dense",
        reconstruction=goal,
        reconstruction_steps=steps,
    )
    report = prune(reference / "stories260k", config, tmp_path / "out")
    assert all(block.after < block.before for block in report.reconstruction)
    assert perplexity(tmp_path / "out", windows_ST) < 1.02 * expected


@pytest.mark.parametrize(("pattern", "peer", "within"), ALPS)
def test_alps(
    pattern: str,
    peer: str,
    within: float,
    reference: Path,
    peer_values: dict[str, float],
    windows_ST: Tensor,
    tmp_path: Path,
) -> None:
    value = pruned_perplexity(reference, "alps", pattern, tmp_path / "out", windows_ST)
    assert value == pytest.approx(peer_values[peer], rel=within)


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] == "ria"], ids=row_id)
def test_ria(
    row: tuple[str, str, str, float],
    reference: Path,
    peer_values: dict[str, float],
    windows_ST: Tensor,
    tmp_path: Path,
) -> None:
    """With exact counts: 25.315 for 25.049, and 77.908 for 77.908 at 2:4."""
    method, pattern, peer, _ = row
    value = pruned_perplexity(reference, method, pattern, tmp_path / "out", windows_ST)
    assert value == pytest.approx(peer_values[peer], rel=0.02)


@pytest.mark.parametrize(("pattern", "peer"), ADMM)
def test_admm_with_the_peers_masks(
    pattern: str,
    peer: str,
    reference: Path,
    peer_values: dict[str, float],
    windows_ST: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prune_llm import masks
    from prune_llm.methods import admm

    def final_mask(scores_OI: Tensor, asked: Pattern, _step: int) -> Tensor:
        floor = int(scores_OI.numel() * asked.sparsity)
        return masks.keep_mask(scores_OI, Pattern(floor / scores_OI.numel()), "matrix")

    monkeypatch.setattr(admm, "_mask", final_mask)
    monkeypatch.setattr(sys.modules["prune_llm.prune_block"], "check_keep_mask", lambda *_: None)
    monkeypatch.setattr("prune_llm.verification.pattern_violation", lambda *_: None)
    out = tmp_path / "out"
    value = pruned_perplexity(reference, "admm", pattern, out, windows_ST, damping=0.1)
    # how a processor's products round grows over the steps: AMD's with AVX-512 are within 0.2 % of
    # the peer; Zen 3 and Emerald Rapids are 0.6 % below it at 60 %
    bound = 0.002 if cpu.isa_names()[0] in ("avx512bf16", "zen5") else 0.01
    assert value == pytest.approx(peer_values[f"admm-repo:{peer}"], rel=bound)


def test_admm_as_the_paper_has_it(
    reference: Path, peer_values: dict[str, float], windows_ST: Tensor, tmp_path: Path
) -> None:
    """2:4, where the authors' code lets the sparsity grow as well."""
    out = tmp_path / "out"
    value = pruned_perplexity(reference, "admm", "2:4", out, windows_ST, damping=0.1)
    assert value == pytest.approx(peer_values["admm-repo:admm-2:4"], rel=0.02)


def test_owl(
    reference: Path, peer_values: dict[str, float], windows_ST: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    value = pruned_perplexity(reference, "sparsegpt", "0.5", out, windows_ST, allocation="owl")
    assert value == pytest.approx(peer_values["owl-repo:owl-sparsegpt-unstructured"], rel=0.02)


@pytest.fixture
def peer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count as the published code does: Wanda floors each row, SparseGPT prunes k + 1 a block."""
    from prune_llm import masks, verification

    exact = masks.pruned_per_row

    def floor_rows(shape_OI: tuple[int, int], pattern: Pattern) -> list[int]:
        if pattern.m is not None:
            return exact(shape_OI, pattern)
        return [int(shape_OI[1] * pattern.sparsity)] * shape_OI[0]

    def one_too_many(block: Any, pattern: Pattern) -> Tensor:
        scores_BO = block._scores(0, block.end - block.start, block.weight_BO)
        parts = []
        for scores in scores_BO.split(block.rows, dim=1):
            count = int(scores.numel() * pattern.sparsity) + 1
            marked = masks.lowest(scores.T.reshape(1, -1), count)
            parts.append(~marked.reshape(scores.shape[1], -1).T)
        return torch.cat(parts, dim=1)

    for module in (masks, verification):
        monkeypatch.setattr(module, "pruned_per_row", floor_rows)
    # every run holds its masks to our exact counts
    monkeypatch.setattr(sys.modules["prune_llm.prune_block"], "check_keep_mask", lambda *_: None)
    monkeypatch.setattr(sparsegpt._Block, "_keep_unstructured", one_too_many)


@pytest.mark.usefixtures("peer_counts")
@pytest.mark.parametrize("row", UNSTRUCTURED, ids=row_id)
def test_peers_values_with_their_counts(
    row: tuple[str, str, str, float],
    reference: Path,
    peer_values: dict[str, float],
    windows_ST: Tensor,
    tmp_path: Path,
) -> None:
    method, pattern, peer, _ = row
    value = pruned_perplexity(reference, method, pattern, tmp_path / "out", windows_ST)
    assert value == pytest.approx(peer_values[peer], rel=0.01)
