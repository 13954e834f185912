"""Training with the mask fixed: what is kept gets better on samples it did not see, or stays."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model
from torch import Tensor

from prune_llm import Pattern, Progress, PruneConfig, prune
from prune_llm.checkpoint import open_checkpoint
from prune_llm.reconstruction import (
    CHECKS,
    PATIENCE,
    BlockReconstruction,
    Training,
    rate_factor,
    shuffled,
    split_samples,
    train,
)
from prune_llm.verification import pattern_violation

GOALS = ("block", "logits")


class Line:
    """Samples of one linear: y = W x, where half of W may not be used."""

    name = "line"

    def __init__(self, weight: Tensor, samples: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(weight.shape[1], weight.shape[1], generator=generator)
        dense = torch.randn(weight.shape, generator=generator)
        self.weight, self.samples = weight.clone(), samples
        self.x = torch.randn(samples, 32, weight.shape[1], generator=generator) @ mixing
        self.y = self.x @ dense.T
        self.asked: list[int] = []

    def loss(self, sample: int) -> Tensor:
        self.asked.append(sample)
        return (self.x[sample] @ self.weight.T - self.y[sample]).square().mean()


def start(seed: int = 1) -> Tensor:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(weight.abs() < 0.7, 0.0)


def run(
    goal: Line, steps: int | None = 80, seconds: float | None = None, rate: float = 0.05,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, BlockReconstruction]:  # fmt: skip
    training = Training(steps=steps, seconds=seconds, rate=rate, seed=seed)
    (weight,), result = train("block", [goal.weight], [dtype], goal, training)
    return weight, result


def held_out_loss(goal: Line, weight: Tensor) -> float:
    _, held_out = split_samples(goal.samples)
    fresh = Line(weight.double(), goal.samples)
    fresh.x, fresh.y = goal.x.double(), goal.y.double()
    return float(sum(fresh.loss(number) for number in held_out) / len(held_out))


class TestTrain:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_loss_falls_and_zeros_stay(self, dtype: torch.dtype) -> None:
        before = start().to(dtype)
        goal = Line(before.float())
        weight, result = run(goal, dtype=dtype)
        assert result.after < 0.9 * result.before and result.trained_after < result.trained_before
        assert weight.dtype == dtype and torch.equal(weight == 0, before == 0)
        assert not (torch.signbit(weight) & (weight == 0)).any()
        # the losses are those of the weights as they are stored
        assert result.before == pytest.approx(held_out_loss(goal, before), rel=1e-5)
        assert result.after == pytest.approx(held_out_loss(goal, weight), rel=1e-5)

    @pytest.mark.parametrize("rate", [1e2, 1e10, 1e30])
    def test_never_worse_than_before(self, rate: float) -> None:
        before = start()
        goal = Line(before.clone())
        weight, result = run(goal, rate=rate)
        assert result.after == result.before == pytest.approx(held_out_loss(goal, before), rel=1e-5)
        assert result.kept_step == 0 and torch.equal(weight, before)
        assert result.ended in ("no progress", "not finite")

    def test_rounding_that_costs_more_than_training_gains_is_rolled_back(self) -> None:
        before = start().to(torch.bfloat16)
        weight, result = run(Line(before.float()), rate=1e-5, dtype=torch.bfloat16)
        assert result.after <= result.before
        assert result.kept_step > 0 or torch.equal(weight, before)

    def test_same_seed_same_weights(self) -> None:
        one, other, third = (run(Line(start()), seed=seed)[0] for seed in (3, 3, 4))
        assert torch.equal(one, other) and not torch.equal(one, third)

    def test_held_out_samples_are_not_trained_on(self) -> None:
        goal = Line(start())
        train_on, held_out = split_samples(goal.samples)
        generators = (shuffled(train_on, 0), shuffled(train_on, 0))
        run(goal, steps=40)
        trained = [n for n in goal.asked if n not in held_out]
        assert (
            list(itertools.islice(generators[0], 40))
            == [n for n in trained if n in train_on][len(held_out) : len(held_out) + 40]
        )
        assert sorted(itertools.islice(generators[1], len(train_on))) == train_on

    def test_budget_of_steps(self) -> None:
        _, result = run(Line(start()), steps=17)
        assert result.steps == 17 and result.ended == "budget"

    def test_budget_of_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a clock that moves a hundredth of a second whenever it is read."""
        read = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: next(read) / 100)
        _, result = run(Line(start()), steps=None, seconds=0.3)
        assert 0.3 <= result.seconds < 0.6
        assert result.ended == "budget" and 1 < result.steps < 30
        _, result = run(Line(start()), steps=5, seconds=1e9)
        assert result.steps == 5

    def test_stops_when_the_held_out_loss_no_longer_falls(self) -> None:
        """Trained on noise, the held-out samples get worse: the best weights are kept."""
        goal = Line(start(), samples=3)
        goal.y[[0, 2]] += 30 * torch.randn(2, 32, 6, generator=torch.Generator().manual_seed(0))
        weight, result = run(goal, steps=800)
        assert result.ended == "no progress"
        assert 0 < result.kept_step == result.steps - 800 * PATIENCE // CHECKS <= 400
        assert result.after == pytest.approx(held_out_loss(goal, weight), rel=1e-5)

    def test_ticks_reach_their_number_however_it_ends(self) -> None:
        for rate in (0.05, 1e10):
            ticks: list[int] = []
            goal = Line(start())
            training = Training(steps=16, seconds=None, rate=rate, seed=0)
            train("b", [goal.weight], [torch.float32], goal, training, lambda t=ticks: t.append(1))
            assert len(ticks) == CHECKS

    def test_a_weight_that_no_sample_reaches_stays(self) -> None:
        goal, apart = Line(start()), start(7)
        training = Training(steps=10, seconds=None, rate=0.05, seed=0)
        dtypes = [torch.float32] * 2
        (_, same), _ = train("b", [goal.weight, apart.clone()], dtypes, goal, training)
        assert torch.equal(same, apart)


def test_rate() -> None:
    rates = [rate_factor(spent / 1000) for spent in range(1000)]
    top = rates.index(max(rates))
    assert 0 < rates[0] < 0.2 and max(rates) == 1.0 and top == 50 and rates[-1] < 1e-4
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)


@pytest.mark.parametrize("count", [2, 3, 8, 12, 24, 96, 97, 128])
def test_split(count: int) -> None:
    trained, held_out = split_samples(count)
    assert sorted(trained + held_out) == list(range(count)) and trained
    assert len(held_out) == len(set(held_out)) == max(1, round(count / 12))
    assert max(b - a for a, b in itertools.pairwise([-1, *held_out, count])) < 2 * 12 + 2


def config(corpus: Path, **changes: Any) -> PruneConfig:
    settings = {
        "calibration": str(corpus),
        "samples": 8,
        "seq_len": 32,
        "device": "cpu",
        "format": "dense",
        "reconstruction": "block",
        "reconstruction_steps": 24,
    }
    return PruneConfig(**{**settings, **changes})


def read_all(directory: Path) -> dict[str, Tensor]:
    return {name: t.read() for name, t in open_checkpoint(directory).tensors.items()}


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
        "llama": llama_config(tie_word_embeddings=True),
        "gpt2": tf.GPT2Config(vocab_size=264, n_embd=32, n_layer=3, n_head=4, n_positions=128),
        "gemma2": tf.Gemma2Config(**grouped, head_dim=8),
        "neox": tf.GPTNeoXConfig(**small, use_parallel_residual=True),
        "falcon": tf.FalconConfig(
            vocab_size=264, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, alibi=True
        ),
        "mixtral": tf.MixtralConfig(**grouped, num_local_experts=5, sliding_window=None),
    }


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "neox", "falcon", "mixtral"])
def test_architectures(name: str, goal: str, corpus: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", families()[name])
    settings = config(corpus, method="wanda", pattern="2:4", reconstruction=goal)
    report = prune(model, settings, tmp_path / "out")
    plain = prune(
        model,
        config(
            corpus, method="wanda", pattern="2:4", reconstruction="none", reconstruction_steps=None
        ),
        tmp_path / "plain",
    )
    assert [block.goal for block in report.reconstruction] == [goal] * 3
    assert all(block.after <= block.before for block in report.reconstruction)
    # a first block sees the same inputs: its masks are the solver's, its values are trained
    dense, found, solved = (read_all(d) for d in (model, tmp_path / "out", tmp_path / "plain"))
    pruned = {r.tensor: r for r in report.linears}
    assert pruned.keys() == {r.tensor for r in plain.linears} and report.sparsity == plain.sparsity
    # what a random model predicts cannot always be got nearer by with this little text
    assert goal == "logits" or report.reconstruction[0].after < report.reconstruction[0].before
    for tensor, weight in found.items():
        if tensor not in pruned:
            assert torch.equal(weight, dense[tensor])
            continue
        weight_OI = weight.T if pruned[tensor].transposed else weight
        assert pattern_violation(weight_OI == 0, Pattern.parse("2:4")) is None
        assert not (torch.signbit(weight) & (weight == 0)).any()
        if pruned[tensor].block == 0:
            assert torch.equal(weight == 0, solved[tensor] == 0)


def logits(directory: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits.double()  # type: ignore[no-any-return]


def samples(model: Path, corpus: Path, count: int, seq_len: int) -> Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(corpus.read_text())["input_ids"]
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_reported_losses_are_true(name: str, corpus: Path, tmp_path: Path) -> None:
    """Behind the last block nothing is left: its loss is that of the finished model."""
    model = save_model(tmp_path / "model", families()[name])
    settings = config(corpus, reconstruction="logits", sampling="first", samples=24, batch_size=5)
    report = prune(model, settings, tmp_path / "out")
    trained_on, held_out = split_samples(24)
    ids = samples(model, corpus, 24, 32)
    wanted, found = (logits(d, ids).log_softmax(-1) for d in (model, tmp_path / "out"))
    lost = (wanted.exp() * (wanted - found)).sum(-1).mean(1)
    last = report.reconstruction[-1]
    assert last.after == pytest.approx(float(lost[held_out].mean()), rel=1e-3, abs=3e-7)
    some = trained_on[:: len(trained_on) // 2][:2]
    assert last.trained_after == pytest.approx(float(lost[some].mean()), rel=1e-3, abs=3e-7)
    saved = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert saved["reconstruction"][-1]["after"] == last.after
    assert saved["config"]["reconstruction"] == "logits"


def test_block_losses_are_those_of_the_two_models(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    report = prune(tiny_llama, config(corpus, sampling="first"), tmp_path / "out")
    ids = samples(tiny_llama, corpus, 8, 32)
    with torch.no_grad():
        wanted, found = (
            AutoModelForCausalLM.from_pretrained(d)(ids, output_hidden_states=True).hidden_states
            for d in (tiny_llama, tmp_path / "out")
        )
    _, held_out = split_samples(8)
    for index, block in enumerate(report.reconstruction[:-1]):
        dense, ours = wanted[index + 1].double(), found[index + 1].double()
        lost = (ours - dense)[held_out].square().mean() / dense.square().mean()
        assert block.after == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("target", ["pruned", "dense"])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_with_either_target_and_any_method(
    method: str, target: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    settings = config(
        corpus, method=method, target=target, format="sparse", samples=24, seq_len=64,
        reconstruction_rate=0.01,
    )  # fmt: skip
    seen: list[Progress] = []
    report = prune(tiny_llama, settings, tmp_path / "out", seen.append)
    first, *others = report.reconstruction
    assert first.after < first.before and all(b.after <= b.before for b in others)
    assert [p.done for p in seen] == list(range(1, seen[0].total + 1))  # type: ignore[operator]
    assert report.verification["linears_checked"] == 21


@pytest.mark.parametrize("resident", [True, False])
def test_progress_reaches_its_total(
    resident: bool, tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_llm.tail.RESIDENT_BYTES", 1 << 30 if resident else 0)
    seen: list[Progress] = []
    settings = config(
        corpus, reconstruction="logits", batch_size=3, ignore=("model.layers.1.*",),
        reconstruction_rate=1e9,
    )  # fmt: skip
    report = prune(tiny_llama, settings, tmp_path / "out", seen.append)
    assert [p.done for p in seen] == list(range(1, seen[0].total + 1))  # type: ignore[operator]
    assert [b.name for b in report.reconstruction] == ["model.layers.0", "model.layers.2"]
    assert all(b.kept_step == 0 and b.after == b.before for b in report.reconstruction)
    (told,) = [warning for warning in report.warnings if warning.startswith("reconstruction: ")]
    assert told.startswith("reconstruction: 2 of 2 blocks kept the solver's weights, because none")
    gained = prune(tiny_llama, config(corpus, reconstruction="block"), tmp_path / "gained")
    stayed = sum(block.kept_step == 0 for block in gained.reconstruction)
    assert any(f"{stayed} of 3 blocks" in warning for warning in gained.warnings) == (stayed > 0)


def test_streaming_the_blocks_behind_changes_nothing(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for name, size in (("whole", 1 << 30), ("streamed", 0)):
        monkeypatch.setattr("prune_llm.tail.RESIDENT_BYTES", size)
        settings = config(corpus, reconstruction="logits", reconstruction_steps=8)
        reports.append(prune(tiny_llama, settings, tmp_path / name))
    for one, other in zip(*(report.reconstruction for report in reports), strict=True):
        assert one.after == pytest.approx(other.after, rel=1e-3)
        assert one.before == pytest.approx(other.before, rel=1e-3)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_the_bits(
    dtype: torch.dtype, goal: str, corpus: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", llama_config(), dtype)
    for run_dtype in ("auto", "float32"):
        output = tmp_path / run_dtype
        settings = config(corpus, reconstruction=goal, dtype=run_dtype, method="wanda")
        report = prune(model, settings, output)
        assert {t.dtype for t in read_all(output).values()} == {dtype}
        assert all(b.after <= b.before for b in report.reconstruction)
        first = report.reconstruction[0]
        assert goal == "logits" or first.after < first.before


@pytest.mark.parametrize("goal", GOALS)
def test_same_options_give_the_same_bytes(
    goal: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        settings = config(corpus, reconstruction=goal, method="wanda", sampling="first", seed=seed)
        prune(tiny_llama, settings, tmp_path / name)
        hashes.append(open_checkpoint(tmp_path / name).sha256())
    assert hashes[0] == hashes[1] != hashes[2]


def test_minutes_are_shared_by_the_blocks(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus, reconstruction_steps=None, reconstruction_minutes=0.02)
    report = prune(tiny_llama, settings, tmp_path / "out")
    assert all(0.4 <= b.seconds < 10 for b in report.reconstruction if b.ended == "budget")
    assert all(b.steps >= 1 for b in report.reconstruction)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"reconstruction": "layer"},
                "reconstruction 'layer': unknown; choose one of none, bl",
            ),
            ({"reconstruction_steps": 0}, "reconstruction_steps 0: must be above 0"),
            ({"reconstruction_minutes": math.nan}, "reconstruction_minutes nan: must be above 0"),
            ({"reconstruction_rate": -1.0}, "reconstruction_rate -1.0: must be above 0"),
            ({"reconstruction": "none"}, "24: nothing is reconstructed; give --reconstruction as"),
        ],
    )
    def test_option(self, changes: dict[str, Any], message: str, corpus: Path) -> None:
        with pytest.raises(ValueError, match=message):
            config(corpus, **changes)

    def test_one_sample(self, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="samples 1: reconstruction trains on some"):
            prune(tiny_llama, config(corpus, samples=1), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_command_line(cli: Any, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    options = ("--calibration", corpus, "--samples", 4, "--seq-len", 32, "--device", "cpu")
    steps = ("--reconstruction-steps", 4)
    output = tmp_path / "out"
    ran = cli("prune", tiny_llama, "-o", output, *options, *steps, "--reconstruction", "logits")
    assert ran.exit_code == 0, ran.output
    assert len(json.loads((output / "prune_report.json").read_text())["reconstruction"]) == 3
    ran = cli("prune", tiny_llama, "-o", tmp_path / "other", *options, *steps)
    assert ran.exit_code == 2 and "give --reconstruction as well" in ran.output
    assert len(ran.output.strip().splitlines()) == 1
