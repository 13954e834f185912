"""Perplexity and KL against their definitions in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model
from transformers import AutoModelForCausalLM

from prune_llm.activation.gates import Gates
from prune_llm.activation.sites import find_sites
from prune_llm_eval.compare import EvalConfig, evaluate
from prune_llm_eval.perplexity import compare, token_perplexity


@pytest.fixture(scope="session")
def pair(tiny_llama: Path) -> list[Any]:
    """The dense model and a perturbed one."""
    models = [AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2)]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return models


def test_equals_the_definition(pair: list[Any]) -> None:
    windows = torch.randint(0, 264, (5, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = [model(windows).logits.double().log_softmax(-1)[:, :-1] for model in pair]
    targets = windows[:, 1:, None]
    nlls = [-log.gather(2, targets).mean(dim=(1, 2)) for log in logs]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    flips = (logs[0].argmax(-1) != logs[1].argmax(-1)).double().mean()
    dense, other = compare(pair, windows, against_first=True)
    for quality, nll in zip((dense, other), nlls, strict=True):
        assert quality.token_ppl == pytest.approx(math.exp(nll.mean()), rel=1e-5)
        assert quality.nll_stderr == pytest.approx(float(nll.std() / 5**0.5), rel=1e-3)
        assert (quality.tokens, quality.windows, quality.seq_len) == (160, 5, 33)
    assert dense.kl is None and dense.flips is None
    assert other.kl == pytest.approx(float(kl), rel=1e-3)
    assert other.flips == pytest.approx(float(flips), abs=1e-9)
    assert token_perplexity(pair[1], windows).token_ppl == other.token_ppl


def test_context_is_read_and_not_scored(pair: list[Any]) -> None:
    windows = torch.randint(0, 264, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = pair[0](windows).logits.double().log_softmax(-1)[:, 9:-1]
    nll = -logs.gather(2, windows[:, 10:, None]).mean()
    (quality,) = compare([pair[0]], windows, against_first=False, context=10)
    assert quality.nll == pytest.approx(float(nll), rel=1e-5) and quality.tokens == 30


def test_gates_are_entered_around_their_model_only(pair: list[Any]) -> None:
    """The same model twice, once with every input of its linears skipped."""
    sites = find_sites(pair[0])
    everything = Gates(sites, [None] * len(sites), [1e9] * len(sites))
    windows = torch.randint(0, 264, (3, 20), generator=torch.Generator().manual_seed(0))
    models, gates = [pair[0]] * 3, [nullcontext(), everything, nullcontext()]
    dense, gated, same = compare(models, windows, against_first=True, gates=gates)
    assert same.kl == 0 and same.nll == dense.nll and gated.kl > 0.01
    assert everything.sparsity == 1.0


def test_a_model_does_not_differ_from_itself(pair: list[Any]) -> None:
    windows = torch.randint(0, 264, (2, 20))
    _, same = compare([pair[0], pair[0]], windows, against_first=True)
    assert same.kl == 0 and same.flips == 0


def test_one_window_has_no_standard_error(pair: list[Any]) -> None:
    assert math.isnan(token_perplexity(pair[0], torch.randint(0, 264, (1, 9))).nll_stderr)


def test_evaluate_puts_the_dense_model_first(tiny_llama: Path, corpus: Path) -> None:
    config = EvalConfig(text=str(corpus), seq_len=64, windows=4, device="cpu")
    rows = evaluate(str(tiny_llama), str(tiny_llama), config, lambda *_: None)
    assert [row.quality.kl for row in rows] == [None, 0.0]
    file = (tiny_llama / "model.safetensors").read_bytes()
    assert rows[0].zeros == 0
    assert rows[0].nbytes == len(file) - 8 - int.from_bytes(file[:8], "little")


def test_different_tokenizers_are_refused(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", llama_config())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = EvalConfig(text=str(corpus), seq_len=64, windows=2)
    with pytest.raises(ValueError, match="different tokens"):
        evaluate(str(other), str(tiny_llama), config, lambda *_: None)


@pytest.mark.parametrize("changes", [{"dtype": "int4"}, {"seq_len": 1}, {"windows": 0}], ids=str)
def test_bad_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} "):
        EvalConfig(**changes)


def test_command_prints_and_writes_json(
    cli: Callable[..., Any], tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "quality.json"
    result = cli(
        "eval", tiny_llama, "--against", tiny_llama, "--text", corpus, "--seq-len", 64,
        "--windows", 3, "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    assert "189 predicted tokens in 3 windows of 64" in result.output
    assert f"{rows[1]['quality']['token_ppl']:.4f}" in result.output
    short = cli("eval", tiny_llama, "--text", corpus, "--seq-len", 100000)
    assert short.exit_code == 2 and "the model's context is 128 tokens" in short.stderr
