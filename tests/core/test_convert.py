"""Both forms of a checkpoint hold the same bytes; what is damaged is named; nothing is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama_config, save_model

from prune_llm import checkpoint as checkpoint_module
from prune_llm.checkpoint import open_checkpoint
from prune_llm.convert import export, info
from prune_llm.prune import PruneConfig, prune
from prune_llm.sparse_checkpoint import (
    SPARSE_INDEX_FILE,
    SPARSE_WEIGHTS_FILE,
    SparseCheckpoint,
    open_sparse,
)

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned bfloat16 model; down_proj has 100 inputs, no multiple of 8."""
    folder = tmp_path_factory.mktemp("convert")
    model = save_model(folder / "model", llama_config(num_hidden_layers=2), torch.bfloat16)
    prune(model, PruneConfig(method="magnitude", pattern="0.5", format="dense"), folder / "pruned")
    return folder / "pruned"


@pytest.fixture(scope="module")
def sparse(pruned: Path) -> Path:
    export(pruned, pruned.parent / "sparse", "sparse")
    return pruned.parent / "sparse"


@pytest.fixture
def copy(sparse: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sparse, tmp_path / "copy"))


def rewrite(directory: Path, change: Any) -> None:
    """Change the tensors of a single-file sparse directory."""
    file = directory / SPARSE_WEIGHTS_FILE
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def settings(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def test_round_trip_is_the_same_checkpoint(pruned: Path, sparse: Path, tmp_path: Path) -> None:
    export(sparse, tmp_path / "dense", "dense")
    assert open_checkpoint(tmp_path / "dense").sha256() == open_checkpoint(pruned).sha256()
    for name in ("config.json", "tokenizer.json", "generation_config.json", "prune_report.json"):
        assert (tmp_path / "dense" / name).read_bytes() == (pruned / name).read_bytes(), name
    assert sorted(p.name for p in (tmp_path / "dense").iterdir()) == sorted(
        p.name for p in pruned.iterdir()
    )


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "0.7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_patterns_and_dtypes(pattern: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", llama_config(num_hidden_layers=1), dtype)
    prune(
        model, PruneConfig(method="magnitude", pattern=pattern, format="dense"), tmp_path / "pruned"
    )
    export(tmp_path / "pruned", tmp_path / "sparse", "sparse")
    export(tmp_path / "sparse", tmp_path / "dense", "dense")
    dense, pruned = open_checkpoint(tmp_path / "dense"), open_checkpoint(tmp_path / "pruned")
    assert dense.sha256() == pruned.sha256()
    packed = open_sparse(tmp_path / "sparse").packed
    assert len(packed) == 7
    assert all(("_offsets" in weight.parts) == (pattern == "0.7") for weight in packed.values())


def test_the_directory_is_as_the_format_says(sparse: Path) -> None:
    files = {path.name for path in sparse.iterdir()}
    assert [name for name in files if name.endswith(".safetensors")] == [SPARSE_WEIGHTS_FILE]
    config = json.loads((sparse / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "prune_llm" and config["format_version"] == 1
    assert config["pattern"] == "0.5" and "lm_head" in config["ignore"]
    assert config["in_features"] == {
        f"model.layers.{i}.mlp.down_proj.weight": 100 for i in range(2)
    }
    names = load_file(sparse / SPARSE_WEIGHTS_FILE).keys()
    assert {UP + suffix for suffix in ("_bitmask", "_packed", "_offsets")} <= names
    assert UP not in names and "model.embed_tokens.weight" in names


def test_shards_are_named_as_transformers_names_a_variant(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 60_000)
    export(pruned, tmp_path / "sparse", "sparse")
    names = sorted(p.name for p in (tmp_path / "sparse").glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(pruned)
    model.save_pretrained(tmp_path / "stock", variant="sparse", max_shard_size="60KB")
    stock = sorted(p.name for p in (tmp_path / "stock").glob("*.safetensors"))
    pattern = f"model.sparse-00001-of-{len(names):05d}.safetensors"
    assert names[0] == pattern and len(names) > 2
    assert stock[0] == f"model.sparse-00001-of-{len(stock):05d}.safetensors"
    index = json.loads((tmp_path / "sparse" / SPARSE_INDEX_FILE).read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert (tmp_path / "stock" / SPARSE_INDEX_FILE).is_file()
    assert not (tmp_path / "sparse" / "model.safetensors.index.json").exists()
    export(tmp_path / "sparse", tmp_path / "dense", "dense")
    assert open_checkpoint(tmp_path / "dense").sha256() == open_checkpoint(pruned).sha256()
    (tmp_path / "sparse" / names[1]).unlink()
    with pytest.raises(ValueError, match=f"shard {names[1]} is missing"):
        open_sparse(tmp_path / "sparse")


def test_checkpoint_pruned_by_others(pruned: Path, tmp_path: Path) -> None:
    """No report: the linears are found by taking the model apart."""
    other = Path(shutil.copytree(pruned, tmp_path / "other"))
    (other / "prune_report.json").unlink()
    export(other, tmp_path / "sparse", "sparse")
    opened = open_sparse(tmp_path / "sparse")
    assert len(opened.packed) == 14
    assert float(opened.form.pattern) == pytest.approx(0.5, abs=0.01)
    export(tmp_path / "sparse", tmp_path / "dense", "dense")
    assert open_checkpoint(tmp_path / "dense").sha256() == open_checkpoint(pruned).sha256()


def test_conv1d_is_packed_by_outputs(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=264, n_embd=24, n_layer=1, n_head=2, n_positions=64)
    model = save_model(tmp_path / "model", config)
    prune(
        model, PruneConfig(method="magnitude", pattern="2:4", format="dense"), tmp_path / "pruned"
    )
    export(tmp_path / "pruned", tmp_path / "sparse", "sparse")
    opened = open_sparse(tmp_path / "sparse")
    fused = next(w for name, w in opened.packed.items() if name.endswith("attn.c_attn.weight"))
    assert fused.shape_OI == (72, 24)
    assert fused.name in opened.form.transposed
    export(tmp_path / "sparse", tmp_path / "dense", "dense")
    dense, pruned = open_checkpoint(tmp_path / "dense"), open_checkpoint(tmp_path / "pruned")
    assert dense.sha256() == pruned.sha256()


def test_what_packing_does_not_shrink_stays_dense(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", llama_config(num_hidden_layers=1), torch.bfloat16)
    prune(
        model, PruneConfig(method="magnitude", pattern="0.02", format="dense"), tmp_path / "pruned"
    )
    with pytest.raises(ValueError, match="none of its 7 linears smaller"):
        export(tmp_path / "pruned", tmp_path / "sparse", "sparse")
    assert [p.name for p in tmp_path.iterdir() if "sparse" in p.name] == []


def test_info_of_both_forms(pruned: Path, sparse: Path) -> None:
    dense, packed = info(pruned, verify=True), info(sparse, verify=True)
    assert (dense.format, packed.format) == ("dense", "sparse")
    assert dense.pattern == packed.pattern == "0.5"
    assert packed.format_version == 1 and dense.format_version is None
    assert packed.provenance["config"]["method"] == "magnitude"
    assert packed.verified == dense.verified == len(open_checkpoint(pruned).tensors)
    assert dense.bytes_dense == dense.bytes_stored == packed.bytes_dense
    assert packed.bytes_stored < 0.9 * packed.bytes_dense
    kinds = {kind.kind: kind for kind in packed.kinds}
    assert kinds.keys() == {kind.kind for kind in dense.kinds}
    up = kinds["mlp.up_proj"]
    assert (up.count, up.packed, up.weights) == (2, 2, 2 * 64 * 100)
    assert up.sparsity == pytest.approx(0.5, abs=1e-3)
    total = packed.total
    assert total is not None and total.count == 14
    assert total.bytes_stored / total.bytes_dense == pytest.approx(0.5625, abs=0.03)


def test_sparse_output_has_the_sparse_size(sparse: Path) -> None:
    opened = open_sparse(sparse)
    assert isinstance(opened, SparseCheckpoint)
    assert abs((sparse / SPARSE_WEIGHTS_FILE).stat().st_size - opened.nbytes) < 20_000


def damage_mask(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP + "_bitmask"][3, 1] ^= 4


def damage_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP + "_packed"][5] = torch.inf


def drop_offsets(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP + "_offsets"]


def zero_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP + "_packed"][5] = 0


def lose_weight(tensors: dict[str, torch.Tensor]) -> None:
    for suffix in ("_bitmask", "_packed", "_offsets"):
        del tensors[UP + suffix]


def cut_offsets(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP + "_offsets"] = tensors[UP + "_offsets"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_mask, "weight_offsets: gives row 3"),
        (damage_value, "weight_packed: holds NaN or infinite"),
        (drop_offsets, "weight_offsets: is missing"),
        (cut_offsets, "weight_offsets: has 100 entries, not 101"),
        (zero_value, "prune_report.json says"),
        (lose_weight, "is in prune_report.json and not in the checkpoint"),
    ],
)
def test_verify_names_what_is_damaged(copy: Path, change: Any, message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(ValueError, match=f"layers.0.mlp.up_proj.*{message}"):
        info(copy, verify=True)


def test_a_damaged_model_is_not_exported(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, damage_mask)
    with pytest.raises(ValueError, match="weight_offsets: gives row 3"):
        export(copy, tmp_path / "dense", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_truncated_file(copy: Path) -> None:
    file = copy / SPARSE_WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        info(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2: .* reads version 1; install a newer prune_llm"),
        ({"pattern": "2:4"}, "weight_offsets: is there, but pattern 2:4 has no offsets"),
        ({"in_features": {UP: 72}}, "weight_bitmask: has 8 bytes a row; 72 inputs need 9"),
    ],
)
def test_other_settings_are_refused(copy: Path, changes: Any, message: str) -> None:
    settings(copy, **changes)
    with pytest.raises(ValueError, match=message):
        info(copy, verify=True)


def test_bad_calls(pruned: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format 'zip': unknown"):
        export(pruned, tmp_path / "x", "zip")
    with pytest.raises(ValueError, match="is in the sparse form already"):
        export(sparse, tmp_path / "x", "sparse")
    with pytest.raises(ValueError, match="is in the dense form already"):
        export(pruned, tmp_path / "x", "dense")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(pruned, sparse, "sparse")
    with pytest.raises(ValueError, match="is not in the sparse form"):
        open_sparse(pruned)
    with pytest.raises(ValueError, match="already quantised or pruned"):
        open_checkpoint(sparse)
