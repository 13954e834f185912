"""Dense targets: weights re-solved for the dense model's output, and the two streams behind it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model
from torch import Tensor

from prune_llm import Pattern, Progress, PruneConfig, prune
from prune_llm import architecture as arch
from prune_llm.blocks import Walk
from prune_llm.checkpoint import open_checkpoint
from prune_llm.dense_target import STRENGTH, aimed_at_dense
from prune_llm.masks import pruned_per_row
from prune_llm.methods import METHODS
from prune_llm.pairing import Read, paired_rows
from prune_llm.statistics import InputStatistics, Needs
from prune_llm.verification import pattern_violation

CPU = torch.device("cpu")


def config(corpus: Path, **changes: Any) -> PruneConfig:
    settings = {
        "calibration": str(corpus),
        "samples": 8,
        "seq_len": 64,
        "device": "cpu",
        "format": "dense",
        "target": "dense",
    }
    return PruneConfig(**{**settings, **changes})


def read_all(directory: Path) -> dict[str, Tensor]:
    return {name: t.read() for name, t in open_checkpoint(directory).tensors.items()}


@torch.no_grad()
def finite_logits(directory: Path) -> bool:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return bool(torch.isfinite(model(torch.arange(40)[None]).logits).all())


def measured(x_TI: Tensor, dense_TI: Tensor, shift_TD: Tensor | None = None) -> InputStatistics:
    statistics = InputStatistics(x_TI.shape[1], CPU, Needs.GRAM, dense_target=True)
    for start in range(0, len(x_TI), 50):
        part = slice(start, start + 50)
        shift = None if shift_TD is None else shift_TD[part]
        x = x_TI[part]
        statistics.update_pair(x, dense_TI[part], len(x), shift, sample=len(x))
    statistics.finish()
    return statistics


class TestSolve:
    @pytest.mark.parametrize("shifted", [False, True])
    @pytest.mark.parametrize("shape_OI", [(1, 1), (7, 13), (30, 5), (3, 65)])
    def test_is_the_least_squares_solution(self, shape_OI: tuple[int, int], shifted: bool) -> None:
        outputs, inputs = shape_OI
        x = torch.randn(170, inputs) @ torch.randn(inputs, inputs)
        dense = x + 0.3 * torch.randn(170, inputs)
        weight, shift = torch.randn(outputs, inputs), torch.randn(170, outputs) * shifted
        statistics = measured(x, dense, shift if shifted else None)
        (found,), notes = aimed_at_dense((weight,), statistics, 0.02, strength=1.0)
        ridge = (0.02 * x.double().square().sum(0).mean()).sqrt() * torch.eye(inputs).double()
        left = torch.cat([x.double(), ridge])
        wanted = dense.double() @ weight.double().T + shift.double()
        right = torch.cat([wanted, ridge @ weight.double().T])
        expected = torch.linalg.lstsq(left, right).solution.T
        assert notes == ()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)

    def test_strength_is_the_share_of_the_way(self) -> None:
        x, weight = torch.randn(80, 6), torch.randn(4, 6)
        statistics = measured(x, x + 0.1 * torch.randn(80, 6))
        (whole,), _ = aimed_at_dense((weight,), statistics, 0.01, strength=1.0)
        (part,), _ = aimed_at_dense((weight,), statistics, 0.01)
        torch.testing.assert_close(part - weight, STRENGTH * (whole - weight))

    def test_linears_of_a_site_do_not_touch_each_other(self) -> None:
        x, first, second = torch.randn(80, 6), torch.randn(4, 6), torch.randn(9, 6)
        statistics = measured(x, x + 0.1)
        together, _ = aimed_at_dense((first, second), statistics, 0.01)
        (alone,), _ = aimed_at_dense((second,), statistics, 0.01)
        torch.testing.assert_close(together[1], alone)

    @pytest.mark.parametrize("damping", [0.0, 0.01, 10.0])
    def test_equal_streams_change_nothing(self, damping: float) -> None:
        x, weight = torch.randn(60, 9), torch.randn(4, 9)
        (found,), _ = aimed_at_dense((weight,), measured(x, x.clone()), damping)
        assert torch.equal(found, weight)

    def test_an_input_that_is_always_zero_keeps_its_weights(self) -> None:
        x, weight = torch.randn(60, 9), torch.randn(4, 9)
        x[:, 3] = 0
        (found,), _ = aimed_at_dense((weight,), measured(x, x + 1), 0.0)
        torch.testing.assert_close(found[:, 3], weight[:, 3])
        assert torch.isfinite(found).all() and not torch.allclose(found, weight)

    def test_damping_is_raised_where_it_must_be(self) -> None:
        # equal columns of 256 signs: the factorisation is exact, and its second pivot 0
        x, weight = torch.randn(256, 1).sign().expand(256, 40).contiguous(), torch.randn(4, 40)
        (found,), notes = aimed_at_dense((weight,), measured(x, x * 1.5), 0.0, strength=1.0)
        assert torch.isfinite(found).all() and "damping raised from 0" in notes[0]
        torch.testing.assert_close(x @ found.T, 1.5 * x @ weight.T, rtol=0.01, atol=0.01)

    def test_overflow_is_refused(self) -> None:
        x = torch.randn(60, 9)
        with pytest.raises(ValueError, match="overflowed"):
            aimed_at_dense((torch.randn(4, 9),), measured(x, x * torch.inf), 0.01)


class TestPairing:
    def test_rows_of_every_token(self) -> None:
        ours, dense = torch.randn(5, 3), torch.randn(5, 3)
        rows, paired = paired_rows(Read(ours), Read(dense))
        assert paired == 5 and torch.equal(rows, dense)

    def test_rows_of_an_expert_go_by_their_token(self) -> None:
        ours = Read(torch.randn(4, 3), torch.tensor([1, 4, 5, 9]))
        dense = Read(torch.randn(3, 3), torch.tensor([0, 4, 9]))
        rows, paired = paired_rows(ours, dense)
        assert paired == 2
        assert torch.equal(rows[[1, 3]], dense.x_TI[1:]) and torch.equal(
            rows[[0, 2]], ours.x_TI[[0, 2]]
        )

    @pytest.mark.parametrize(
        "dense", [None, Read(torch.ones(4, 3), known=False), Read(torch.ones(5, 3))]
    )
    def test_what_cannot_be_paired_keeps_its_rows(self, dense: Read | None) -> None:
        ours = Read(torch.randn(4, 3))
        rows, paired = paired_rows(ours, dense)
        assert paired == 0 and torch.equal(rows, ours.x_TI)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "3:8"])
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact(
    method: str, pattern: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = config(corpus, method=method, pattern=pattern)
    report = prune(tiny_llama, settings, tmp_path / "out")
    dense, pruned, parsed = read_all(tiny_llama), read_all(tmp_path / "out"), Pattern.parse(pattern)
    linears = {result.tensor for result in report.linears}
    assert len(linears) == 21 and report.config["target"] == "dense" and not report.warnings
    for name in linears:
        weight = pruned[name]
        expected = sum(pruned_per_row((weight.shape[0], weight.shape[1]), parsed))
        assert int((weight == 0).sum()) == expected
        assert pattern_violation(weight == 0, parsed) is None
    assert all(torch.equal(pruned[name], dense[name]) for name in dense if name not in linears)
    assert finite_logits(tmp_path / "out")


def test_first_site_is_pruned_as_without_a_target(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """Nothing is broken yet in front of it; everything behind it differs."""
    prune(tiny_llama, config(corpus, target="pruned"), tmp_path / "a")
    prune(tiny_llama, config(corpus), tmp_path / "b")
    one, other = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    first = "model.layers.0.self_attn."
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(one[f"{first}{name}.weight"], other[f"{first}{name}.weight"])
    assert not torch.equal(one[f"{first}o_proj.weight"], other[f"{first}o_proj.weight"])


def inputs_of(directory: Path, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """What modules of a model read, float64 [T, I]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _m, args, kw: seen.__setitem__(
            name, (args[0] if args else kw["hidden_states"]).double().flatten(0, -2)
        )

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
    with torch.no_grad():
        model(ids)
    return seen


@pytest.mark.parametrize(
    ("linear", "added_to"),
    [
        ("self_attn.q_proj", None),
        ("self_attn.o_proj", "model.layers.1"),
        ("mlp.up_proj", None),
        ("mlp.down_proj", "model.layers.1.post_attention_layernorm"),
    ],
)
def test_statistics_are_those_of_the_two_finished_models(
    linear: str,
    added_to: str | None,
    tiny_llama: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A site sees all linears before it as they are in the end; so the error it reports is true."""
    from transformers import AutoTokenizer

    monkeypatch.setattr("prune_llm.block.ERROR_TOKENS", 8 * 64)  # all of them
    settings = config(corpus, method="wanda", sampling="first", batch_size=4)
    prune(tiny_llama, settings, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tiny_llama)(corpus.read_text())["input_ids"][: 8 * 64]
    name = f"model.layers.1.{linear}"
    names = [name] if added_to is None else [name, added_to]
    tokens = torch.tensor(ids).view(8, 64)
    x, dense = (inputs_of(d, names, tokens) for d in (tmp_path / "out", tiny_llama))
    weight, pruned = (
        read_all(d)[f"{name}.weight"].double() for d in (tiny_llama, tmp_path / "out")
    )
    whole = dense[name] @ weight.T
    lost = whole - x[name] @ pruned.T
    if added_to is not None:
        lost += dense[added_to] - x[added_to]
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    reported = next(r for r in report["linears"] if r["name"] == name)
    error = float(lost.square().sum() / whole.square().sum())
    assert reported["error"] == pytest.approx(error, rel=1e-3)
    assert reported["error_tokens"] == 8 * 64


def families() -> dict[str, Any]:
    import transformers as tf

    small: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    }
    grouped = {**small, "num_key_value_heads": 2}
    return {
        "llama": llama_config(),
        "gpt2": tf.GPT2Config(vocab_size=264, n_embd=32, n_layer=3, n_head=4, n_positions=128),
        "gemma2": tf.Gemma2Config(**grouped, head_dim=8),
        "neox": tf.GPTNeoXConfig(**small, use_parallel_residual=True),
        "falcon": tf.FalconConfig(
            vocab_size=264, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True
        ),
        "mixtral": tf.MixtralConfig(**grouped, num_local_experts=5, sliding_window=None),
    }


# the linears whose output a block adds to its hidden states as it is
ADDED = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gemma2": set(),  # normalised first
    "neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},  # added in place
    "mixtral": {"self_attn.o_proj"},  # experts are weighted first
}


@pytest.mark.parametrize("name", ADDED)
def test_two_streams(name: str, tmp_path: Path) -> None:
    """One is the pruned model's, one the dense model's; each stage knows what it is added to."""
    from transformers import AutoModelForCausalLM

    directory = save_model(tmp_path, families()[name])
    checkpoint = open_checkpoint(directory)
    ids = torch.randint(3, 200, (5, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    walk = Walk(
        arch.build(directory, checkpoint.tensors), checkpoint, ids, list,
        device=CPU, dtype=torch.float32, batch_size=2, tick=lambda *_: None, dense_target=True,
    )  # fmt: skip
    for block in walk:
        assert block._stream is not None and block._dense is not None
        found = torch.cat(list(block._dense))
        torch.testing.assert_close(found, expected[block.index], rtol=1e-5, atol=1e-5)
        distance = (torch.cat(list(block._stream)) - found).norm()
        assert (distance == 0) == (block.index == 0)
        stages = block._stages()
        assert {s.kinds[0] for s in stages if s.silent} == ADDED[name]
        assert sum(len(s.kinds) for s in stages) == len(block.linears)
        for site, statistics in block.statistics(Needs.GRAM):
            assert statistics is not None
            for linear in site.linears:
                half = linear.weight * (torch.rand_like(linear.weight) > 0.5)
                block.assign(linear, half)
        weights = block._dense_weights
    assert weights == []  # let go of before the next block is read


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_architectures(name: str, method: str, corpus: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", families()[name])
    settings = config(corpus, method=method, pattern="2:4")
    report = prune(model, settings, tmp_path / "out")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert finite_logits(tmp_path / "out")
    routed = [warning for warning in report.warnings if "sites of experts share" in warning]
    assert len(routed) == (name == "mixtral")


def test_an_expert_without_tokens_of_its_own_keeps_the_pruned_target(
    corpus: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", families()["mixtral"])
    settings = config(corpus, method="wanda", samples=1, seq_len=3)
    report = prune(model, settings, tmp_path / "out")
    assert any("no calibration token reached" in warning for warning in report.warnings)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_progress_reaches_its_total(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings = config(corpus, method="wanda", batch_size=3)
    prune(tiny_llama, settings, tmp_path / "out", seen.append)
    assert [p.done for p in seen] == list(range(1, seen[0].total + 1))


def test_command_line(cli: Any, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    options = ("--calibration", corpus, "--samples", 4, "--seq-len", 32, "--device", "cpu")
    ran = cli("prune", tiny_llama, "-o", tmp_path / "out", "--target", "dense", *options)
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert report["config"]["target"] == "dense"
    with pytest.raises(ValueError, match="target 'both': unknown; choose one of pruned, dense"):
        PruneConfig(target="both")
