"""The whole pipeline on tiny models: what is written is what was asked for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model
from torch import Tensor

from prune_llm import Pattern, Progress, PruneConfig, prune
from prune_llm.checkpoint import open_checkpoint
from prune_llm.masks import pruned_per_row
from prune_llm.methods import METHODS
from prune_llm.verification import VerificationError, pattern_violation, verify


def config(corpus: Path, **changes: Any) -> PruneConfig:
    settings = {
        "calibration": str(corpus),
        "samples": 8,
        "seq_len": 64,
        "device": "cpu",
        "format": "dense",
    }
    return PruneConfig(**{**settings, **changes})


def read_all(directory: Path) -> dict[str, Tensor]:
    return {name: t.read() for name, t in open_checkpoint(directory).tensors.items()}


def logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("pattern", ["0.5", "0.33", "2:4", "3:8"])
@pytest.mark.parametrize("method", METHODS)
def test_counts_and_untouched_bytes(
    method: str, pattern: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    report = prune(tiny_llama, config(corpus, method=method, pattern=pattern), tmp_path / "out")
    dense, pruned = read_all(tiny_llama), read_all(tmp_path / "out")
    assert dense.keys() == pruned.keys()
    parsed = Pattern.parse(pattern)
    linears = {result.tensor: result for result in report.linears}
    assert len(linears) == 7 * 3
    for name, weight in pruned.items():
        if name not in linears:
            assert torch.equal(weight, dense[name])
            continue
        expected = sum(pruned_per_row((weight.shape[0], weight.shape[1]), parsed))
        assert int((weight == 0).sum()) == expected == weight.numel() - linears[name].kept
        assert pattern_violation(weight == 0, parsed) is None
        assert not (torch.signbit(weight) & (weight == 0)).any()
        if method not in ("sparsegpt", "admm", "alps"):  # no update: what is kept is what it was
            assert torch.equal(weight[weight != 0], dense[name][weight != 0])
    assert report.verification == {
        "linears_checked": 21,
        "tensors_identical": len(dense) - 21,
    }
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize("method", METHODS)
def test_stream_flows_through_pruned_blocks(
    method: str, tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block's statistics are those of its inputs in the finished pruned model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("prune_llm.block.ERROR_TOKENS", 8 * 64)  # all of them
    prune(tiny_llama, config(corpus, method=method, sampling="first"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    seen: dict[str, Tensor] = {}
    name = "model.layers.2.self_attn.q_proj"
    model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: seen.__setitem__(name, args[0])
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(corpus.read_text())["input_ids"][: 8 * 64]).view(8, 64)
    with torch.no_grad():
        model(ids)
    x = seen[name].double().reshape(-1, 64)
    dense = read_all(tiny_llama)[name + ".weight"].double()
    pruned = read_all(tmp_path / "out")[name + ".weight"].double()
    error = float((x @ (dense - pruned).T).square().sum() / (x @ dense.T).square().sum())
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    reported = next(r for r in report["linears"] if r["name"] == name)
    # magnitude too: a text is named, so it is measured
    assert reported["error"] == pytest.approx(error, rel=1e-3)
    assert reported["error_tokens"] == 8 * 64


def test_same_options_give_the_same_bytes(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    hashes = set()
    for run in ("a", "b"):
        prune(tiny_llama, config(corpus, method="sparsegpt"), tmp_path / run)
        hashes.add(open_checkpoint(tmp_path / run).sha256())
    assert len(hashes) == 1
    prune(tiny_llama, config(corpus, method="sparsegpt", seed=1, samples=4), tmp_path / "c")
    assert open_checkpoint(tmp_path / "c").sha256() not in hashes


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_does_not_matter(
    batch_size: int, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    prune(tiny_llama, config(corpus, method="wanda", batch_size=batch_size), tmp_path / "a")
    prune(tiny_llama, config(corpus, method="wanda", batch_size=5), tmp_path / "b")
    one, other = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    differing = sum(int((one[n] != other[n]).sum()) for n in one)
    assert differing <= 4  # a rank may flip where two scores agree to the last bit


def test_magnitude_needs_no_data(tiny_llama: Path, tmp_path: Path) -> None:
    report = prune(
        tiny_llama, PruneConfig(method="magnitude", device="cpu", format="dense"), tmp_path / "out"
    )
    assert report.calibration is None
    assert all(result.error is None for result in report.linears)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtype_is_kept(dtype: torch.dtype, corpus: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", llama_config(), dtype)
    for run_dtype in ("auto", "float32"):
        output = tmp_path / run_dtype
        prune(model, config(corpus, method="sparsegpt", dtype=run_dtype), output)
        assert {t.dtype for t in read_all(output).values()} == {dtype}


def test_tied_embeddings_are_left_alone(corpus: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", llama_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in open_checkpoint(model).tensors
    prune(model, config(corpus, method="sparsegpt"), tmp_path / "out")
    name = "model.embed_tokens.weight"
    assert torch.equal(read_all(tmp_path / "out")[name], read_all(model)[name])
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_tied_embedding_stored_under_the_head_only(corpus: Path, tmp_path: Path) -> None:
    """Ties are found by identity: the file may hold either name."""
    from safetensors.torch import load_file, save_file

    model = save_model(tmp_path / "model", llama_config(tie_word_embeddings=True))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    report = prune(model, config(corpus, method="wanda"), tmp_path / "out")
    assert len(report.linears) == 21


def test_tied_linears_are_left_alone(tiny_llama: Path) -> None:
    from prune_llm import architecture as arch

    built = arch.build(tiny_llama, open_checkpoint(tiny_llama).tensors)
    first, second = built.blocks[0].mlp, built.blocks[1].mlp
    second.up_proj.weight = first.up_proj.weight
    tied = arch.tied_names(built.model)
    assert tied == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"}


def test_ignore_and_report(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    settings = config(corpus, method="wanda", ignore=("model.layers.0.*", "mlp.down_proj"))
    report = prune(tiny_llama, settings, tmp_path / "out")
    names = {result.name for result in report.linears}
    assert len(names) == 12 and not any("layers.0." in n or "down_proj" in n for n in names)
    saved = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert saved["config"]["ignore"] == ["model.layers.0.*", "mlp.down_proj"]
    assert saved["config"]["seed"] == 0
    assert len(saved["model_sha256"]) == len(saved["calibration"]["sha256"]) == 64
    assert saved["environment"]["torch"] == torch.__version__
    assert saved["calibration"]["samples"] == 8


def test_companions_travel(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (source / "LICENSE").write_text("terms")
    (source / "README.md").write_text("a card of the dense model")
    prune(source, config(corpus, method="magnitude"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "LICENSE", "generation_config.json"} <= names
    assert "README.md" not in names
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_progress_reaches_its_total(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    prune(tiny_llama, config(corpus, method="wanda", batch_size=3), tmp_path / "out", seen.append)
    assert [p.done for p in seen] == list(range(1, seen[0].total + 1))
    assert {p.block for p in seen} == {0, 1, 2}


def test_rank_deficient_gram_warns(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, config(corpus, samples=1, seq_len=32), tmp_path / "out")
    assert any("rank-deficient" in warning for warning in report.warnings)
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)


def test_fewer_samples_than_asked_warns(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    report = prune(tiny_llama, config(corpus, samples=10_000), tmp_path / "out")
    assert any("10000 were asked for" in warning for warning in report.warnings)


def test_failure_leaves_nothing(
    tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object) -> None:
        raise VerificationError("as if the disk had lied")

    monkeypatch.setattr(sys.modules["prune_llm.prune"], "verify", broken)
    with pytest.raises(VerificationError):
        prune(tiny_llama, config(corpus, method="magnitude"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class TestVerification:
    """A written checkpoint that was tampered with is caught."""

    @pytest.fixture
    def pruned(self, tiny_llama: Path, corpus: Path, tmp_path: Path) -> tuple[Path, Any]:
        report = prune(tiny_llama, config(corpus, pattern="2:4"), tmp_path / "out")
        return tmp_path / "out", report

    @pytest.mark.parametrize(
        ("name", "index", "value", "message"),
        [
            ("model.layers.1.mlp.up_proj.weight", None, 1.0, "non-zero"),
            ("model.layers.1.mlp.up_proj.weight", None, float("nan"), "NaN"),
            ("model.layers.1.mlp.up_proj.weight", None, -0.0, r"-0\.0"),
            ("model.norm.weight", 0, 7.0, "left alone"),
        ],
    )
    def test_changed_value(
        self,
        pruned: tuple[Path, Any],
        tiny_llama: Path,
        name: str,
        index: int | None,
        value: float,
        message: str,
    ) -> None:
        from safetensors.torch import load_file, save_file

        directory, report = pruned
        tensors = load_file(directory / "model.safetensors")
        flat = tensors[name].flatten()
        position = index if index is not None else int((flat == 0).nonzero()[0])
        flat[position] = value
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(VerificationError, match=message):
            verify(directory, open_checkpoint(tiny_llama), report.linears)

    def test_missing_tensor(self, pruned: tuple[Path, Any], tiny_llama: Path) -> None:
        from safetensors.torch import load_file, save_file

        directory, report = pruned
        tensors = load_file(directory / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(VerificationError, match="names differ"):
            verify(directory, open_checkpoint(tiny_llama), report.linears)

    def test_pattern_is_checked_group_by_group(self) -> None:
        zero = torch.tensor([[True, True, False, False, False, False, True, True]])
        assert pattern_violation(zero, Pattern.parse("2:4")) is None
        shifted = zero.roll(1, dims=1)
        assert pattern_violation(shifted, Pattern.parse("2:4")) is not None
        assert pattern_violation(zero, Pattern.parse("0.5")) is None
        assert "asks for 5" in str(pattern_violation(zero, Pattern.parse("0.6")))


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"method": "foo"}, "method 'foo': unknown; choose one of magnitude"),
            ({"pattern": "4:2"}, "pattern '4:2'"),
            ({"pattern": "0"}, "prunes nothing"),
            ({"samples": 0}, "samples 0: must be at least 1"),
            ({"damping": -1.0}, "damping -1.0: must be in"),
            ({"damping": float("nan")}, "damping nan"),
            ({"dtype": "int8"}, "dtype 'int8'"),
            ({"device": "tpu"}, "device 'tpu'"),
            ({"format": "zip"}, "format 'zip'"),
            ({"sampling": "last"}, "sampling 'last'"),
        ],
    )
    def test_option(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            PruneConfig(**changes)

    def test_everything_ignored(self, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nothing was pruned"):
            prune(tiny_llama, config(corpus, ignore=("model.*",)), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_ignore_that_matches_nothing(
        self, tiny_llama: Path, corpus: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match="ignore 'lm_heat': matches no linear"):
            prune(tiny_llama, config(corpus, ignore=("lm_heat",)), tmp_path / "out")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_bad_weights(self, value: float, corpus: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        model = save_model(tmp_path / "model", llama_config())
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        for method in METHODS:
            with pytest.raises(ValueError, match=r"not finite|NaN or infinite"):
                prune(model, config(corpus, method=method), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_missing_weight_is_named(self, corpus: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        model = save_model(tmp_path / "model", llama_config())
        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
            prune(model, config(corpus), tmp_path / "out")

    def test_wrong_tokenizer(self, corpus: Path, tmp_path: Path) -> None:
        model = save_model(tmp_path / "model", llama_config(vocab_size=40))
        with pytest.raises(ValueError, match="belongs to another model"):
            prune(model, config(corpus), tmp_path / "out")

    def test_cuda_where_there_is_none(
        self, tiny_llama: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device 'cuda': this machine has 0 CUDA"):
            prune(tiny_llama, config(corpus, device="cuda"), tmp_path / "out")


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_sparse_form_is_the_default_and_holds_the_same_model(
    pattern: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    """The packed checkpoint is smaller, exports to the dense one, and predicts the same."""
    from prune_llm import export, load
    from prune_llm.sparse_checkpoint import open_sparse

    assert PruneConfig().format == "sparse"
    prune(tiny_llama, config(corpus, pattern=pattern), tmp_path / "dense")
    report = prune(
        tiny_llama, config(corpus, pattern=pattern, format="sparse"), tmp_path / "packed"
    )
    assert report.bytes_after < 0.8 * report.bytes_before
    assert not (tmp_path / "packed" / "model.safetensors").exists()
    assert set(open_sparse(tmp_path / "packed").names) == set(read_all(tiny_llama))
    export(tmp_path / "packed", tmp_path / "back", "dense")
    assert (
        open_checkpoint(tmp_path / "back").sha256() == open_checkpoint(tmp_path / "dense").sha256()
    )
    with torch.no_grad():
        packed = load(tmp_path / "packed")(torch.arange(40)[None]).logits
    torch.testing.assert_close(packed, logits(tmp_path / "dense"), rtol=1e-4, atol=1e-4)
