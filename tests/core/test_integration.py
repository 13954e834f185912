"""Sparse directories in transformers: loaded packed, saved packed, refused where unknown."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama_config, save_model

from prune_llm import checkpoint as checkpoint_module
from prune_llm.checkpoint import open_checkpoint
from prune_llm.convert import export
from prune_llm.integration import SparseConfig, SparseQuantizer, load, register
from prune_llm.prune import PruneConfig, prune
from prune_llm.registration import register_when_imported
from prune_llm.sparse_checkpoint import SPARSE_WEIGHTS_FILE, open_sparse
from prune_llm.sparse_linear import SparseLinear
from prune_llm_kernels import dispatch

TOKENS = torch.arange(3, 12).reshape(1, 9)
UP = "model.layers.0.mlp.up_proj.weight"

REGISTER = "from prune_llm.registration import register_when_imported; register_when_imported()"
LOAD = (
    "import sys; from transformers import AutoModelForCausalLM; "
    "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    ".model.layers[0].mlp.up_proj).__name__)"
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    torch.set_num_threads(1)
    register()


def make(folder: Path, config: Any, dtype: torch.dtype, pattern: str = "0.5") -> tuple[Path, Path]:
    """A pruned model in the dense and in the sparse form."""
    save_model(folder / "model", config, dtype)
    prune(
        folder / "model",
        PruneConfig(method="magnitude", pattern=pattern, format="dense"),
        folder / "dense",
    )
    export(folder / "dense", folder / "sparse", "sparse")
    return folder / "dense", folder / "sparse"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("pair"), llama_config(num_hidden_layers=2), torch.bfloat16)


@pytest.fixture
def backend_reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PRUNE_LLM_BACKEND", "reference")
    dispatch.backend_for.cache_clear()
    yield
    dispatch.backend_for.cache_clear()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits.float()


def dense_logits(directory: Path, **settings: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(directory, **settings))


def sparse_linears(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def test_packed_logits_are_the_dense_ones_in_reference_mode(
    pair: tuple[Path, Path], backend_reference: None
) -> None:
    dense, sparse = pair
    model = load(sparse)
    assert len(sparse_linears(model)) == 14
    assert torch.equal(logits(model), dense_logits(dense))


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_logits_with_kernels(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    """At most twice the error that the dense model has itself, against float64."""
    dense, sparse = make(tmp_path, llama_config(num_hidden_layers=1), dtype, pattern)
    exact = dense_logits(dense, dtype=torch.float64)
    error = (dense_logits(dense) - exact).abs().max()
    assert (logits(load(sparse)) - exact).abs().max() <= 2 * error
    assert all(
        (m.weight_offsets is None) == (pattern == "2:4") for m in sparse_linears(load(sparse))
    )


def test_state_is_what_lies_on_disk(pair: tuple[Path, Path]) -> None:
    stored, state = load_file(pair[1] / SPARSE_WEIGHTS_FILE), load(pair[1]).state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert not any(
        parameter.requires_grad
        for m in sparse_linears(load(pair[1]))
        for parameter in m.parameters()
    )


def test_end_to_end_keeps_every_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """prune -> export sparse -> load -> save -> export dense gives what prune wrote."""
    dense, sparse = pair
    load(sparse).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert open_sparse(tmp_path / "saved").form == open_sparse(sparse).form
    assert torch.equal(logits(load(tmp_path / "saved")), logits(load(sparse)))
    export(tmp_path / "saved", tmp_path / "dense", "dense")
    assert open_checkpoint(tmp_path / "dense").sha256() == open_checkpoint(dense).sha256()


def test_auto_model_and_shards(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 40_000)
    export(pair[0], tmp_path / "sparse", "sparse")
    assert len(list((tmp_path / "sparse").glob("*.safetensors"))) > 2
    expected = logits(load(pair[1]))
    for settings in ({}, {"variant": "sparse"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", **settings)
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("model.sparse-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    assert not hasattr(model.config, "transformers_weights")


def test_dtype_casts_the_values_only(pair: tuple[Path, Path]) -> None:
    model = load(pair[1], dtype=torch.float32)
    assert {module.weight_packed.dtype for module in sparse_linears(model)} == {torch.float32}
    assert {module.weight_bitmask.dtype for module in sparse_linears(model)} == {torch.uint8}
    torch.testing.assert_close(logits(model), dense_logits(pair[0], dtype=torch.float32))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(pair: tuple[Path, Path], device_map: Any) -> None:
    assert torch.equal(logits(load(pair[1], device_map=device_map)), logits(load(pair[1])))


def test_disk_offload(pair: tuple[Path, Path], tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(pair[1], device_map=places, offload_folder=str(tmp_path))
    on_disk = model.model.layers[1].mlp.up_proj
    assert on_disk.weight_packed.device.type == "meta"
    assert torch.equal(logits(model), logits(load(pair[1])))
    assert on_disk.weight_packed.device.type == "meta" and on_disk._checked is None
    with pytest.raises(ValueError, match="is offloaded to disk"):
        model.dequantize()


@pytest.mark.parametrize("how", ["load", "config", "method"])
def test_dequantize(pair: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    from transformers import AutoModelForCausalLM

    if how == "load":
        model = load(pair[1], dequantize=True)
    elif how == "config":
        with pytest.warns(UserWarning, match="will be overwritten"):
            model = AutoModelForCausalLM.from_pretrained(
                pair[1], quantization_config=SparseConfig(dequantize=True)
            )
    else:
        model = load(pair[1])
        model.dequantize()
    assert not sparse_linears(model)
    assert torch.equal(logits(model), dense_logits(pair[0]))
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert open_checkpoint(tmp_path / "dense").sha256() == open_checkpoint(pair[0]).sha256()


def test_conv1d_with_bias(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=264, n_embd=24, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    dense, sparse = make(tmp_path, config, torch.float32, "2:4")
    model = load(sparse)
    assert len(sparse_linears(model)) == 8 and all(m.transposed for m in sparse_linears(model))
    torch.testing.assert_close(logits(model), dense_logits(dense), rtol=1e-5, atol=1e-5)
    model.dequantize()
    model.save_pretrained(tmp_path / "again")
    assert open_checkpoint(tmp_path / "again").sha256() == open_checkpoint(dense).sha256()


def test_load_takes_the_dense_form(pair: tuple[Path, Path]) -> None:
    assert torch.equal(logits(load(pair[0])), dense_logits(pair[0]))


def test_generate_is_greedy_as_the_dense_model(pair: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    dense = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    ours = load(pair[1], dtype=torch.float32).generate(TOKENS, **settings)
    assert torch.equal(ours, dense.generate(TOKENS, **settings))


def test_a_packed_block_compiles_without_a_break(pair: tuple[Path, Path]) -> None:
    mlp = load(pair[1]).model.layers[1].mlp
    x = torch.randn(2, 3, 64).bfloat16()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), mlp(x))


def test_changed_tensors_are_checked_again(pair: tuple[Path, Path]) -> None:
    model = load(pair[1])
    module = sparse_linears(model)[0]
    first = module.packed_weight()
    assert module.packed_weight() is first
    twin = copy.deepcopy(module)
    assert twin.packed_weight().packed is twin.weight_packed
    state = module.state_dict()
    state["weight_bitmask"] = state["weight_bitmask"] ^ 1
    module.load_state_dict(state)
    with pytest.raises(ValueError, match=r"q_proj\.weight_bitmask row \d+ keeps"):
        module(torch.zeros(1, 64, dtype=torch.bfloat16))
    moved = twin.to(torch.float32)
    assert moved.packed_weight().dtype == torch.float32


@pytest.mark.parametrize("how", ["mask", "short", "width", "version", "name"])
def test_damage_is_named_when_loading(pair: tuple[Path, Path], tmp_path: Path, how: str) -> None:
    from transformers import AutoModelForCausalLM

    directory = Path(shutil.copytree(pair[1], tmp_path / "copy"))
    tensors = load_file(directory / SPARSE_WEIGHTS_FILE)
    settings = json.loads((directory / "config.json").read_text())
    if how == "mask":
        tensors[UP + "_bitmask"][2, 2] ^= 1
    elif how == "short":
        tensors[UP + "_packed"] = tensors[UP + "_packed"][:-1].clone()
    elif how == "width":
        settings["quantization_config"]["in_features"][UP] = 63
    elif how == "version":
        settings["quantization_config"]["format_version"] = 7
    else:
        for suffix in ("_bitmask", "_packed", "_offsets"):
            tensors[UP.replace("up_", "upper_") + suffix] = tensors.pop(UP + suffix)
    save_file(tensors, directory / SPARSE_WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(settings))
    message = {
        "mask": r"up_proj\.weight_bitmask row 2",
        "short": r"up_proj\.weight_offsets",
        "width": r"up_proj\.weight_bitmask: describes a weight of shape \[100, 63\]",
        "version": "format_version 7: this prune_llm reads version 1",
        "name": "has no linear model.layers.0.mlp.upper_proj",
    }[how]
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


def run(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True
    )


def test_registers_when_transformers_is_imported_later(pair: tuple[Path, Path]) -> None:
    """The hook imports nothing itself, and goes away after its use."""
    check = "import sys; assert 'transformers' not in sys.modules"
    hooks = "[f for f in sys.meta_path if type(f).__module__ == 'prune_llm.registration']"
    code = f"{REGISTER}; {check}; assert len({hooks}) == 1; {LOAD}; assert not {hooks}"
    done = run(code, pair[1])
    assert done.stdout.strip() == "SparseLinear", done.stderr
    assert done.returncode == 0


def test_registers_when_the_integration_imports_transformers(pair: tuple[Path, Path]) -> None:
    """`prune_llm.load` comes first: the hook then runs in the middle of that import."""
    code = f"{REGISTER}; from prune_llm.integration import load; {LOAD}"
    done = run(code, pair[1])
    assert done.stdout.strip() == "SparseLinear", done.stderr


def test_registers_when_transformers_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "prune_llm")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "prune_llm")
    monkeypatch.setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    register_when_imported()
    assert auto.AUTO_QUANTIZER_MAPPING["prune_llm"] is SparseQuantizer
    assert (SparseConfig,) == auto.LOADING_ATTRIBUTES_CONFIG_TYPES


def test_transformers_alone_refuses(pair: tuple[Path, Path]) -> None:
    """It does not know the method, and must not go on with random weights."""
    done = run(LOAD, pair[1])
    assert done.returncode != 0 and done.stdout == ""
    assert "no file named model.safetensors" in done.stderr


def test_registering_twice_is_harmless() -> None:
    from transformers.quantizers import auto

    register_when_imported()
    register()
    register()
    assert auto.LOADING_ATTRIBUTES_CONFIG_TYPES.count(SparseConfig) == 1
    found = [f for f in sys.meta_path if type(f).__module__ == "prune_llm.registration"]
    assert found == []


def test_a_dense_model_cannot_be_made_sparse_by_loading(pair: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(pair[0], quantization_config=SparseConfig())
