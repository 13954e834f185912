"""Reading, hashing and writing checkpoints; damaged files end in one clear ValueError."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama_config, save_model

from prune_llm import checkpoint as module
from prune_llm.checkpoint import open_checkpoint, read_header, write_shards
from prune_llm.staging import Staging


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_reads_every_dtype_exactly(tmp_path: Path) -> None:
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in module.DTYPES.values()}
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "x.safetensors")
    stored = {t.name: t for t in read_header(tmp_path / "x.safetensors")}
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_sharded_and_single_are_the_same_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    sharded = save_model(tmp_path / "sharded", llama_config(), max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert open_checkpoint(sharded).sha256() == open_checkpoint(tiny_llama).sha256()


def test_write_shards_keeps_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_llama)
    monkeypatch.setattr(module, "SHARD_BYTES", 60_000)
    write_shards(tmp_path, source.tensors.values())
    shutil.copyfile(tiny_llama / "config.json", tmp_path / "config.json")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert open_checkpoint(tmp_path).sha256() == source.sha256()
    # other readers agree
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_written_tensors_are_aligned(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2)}, tmp_path / "in")
    written = write_shards(tmp_path, read_header(tmp_path / "in"))
    assert all(t.start % module.DTYPES[t.dtype].itemsize == 0 for t in written.values())
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], torch.ones(2))


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if how == "truncated":
        file.write_bytes(data[:-100])
    elif how == "header cut":
        file.write_bytes(data[: length // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "not json":
        file.write_bytes(data[:8] + b"x" * length + data[8 + length :])
    elif how == "huge header":
        file.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    elif how == "appended":
        file.write_bytes(data + b"\0" * 64)
    else:
        name = next(n for n in header if n != "__metadata__")
        header[name].update(BAD_ENTRIES[how])
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


BAD_ENTRIES: dict[str, dict[str, object]] = {
    "wrong shape": {"shape": [999, 999]},
    "negative shape": {"shape": [-1, -4]},
    "absurd shape": {"shape": [1 << 62, 1 << 62]},
    "unknown dtype": {"dtype": "F3"},
    "overlong offsets": {"data_offsets": [0, 1 << 50]},
    "offsets not numbers": {"data_offsets": ["a", "b"]},
    "no offsets": {"data_offsets": None},
}
DAMAGES = ["truncated", "header cut", "empty", "not json", "huge header", "appended", *BAD_ENTRIES]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_shard_is_named(copy: Path, how: str) -> None:
    damage(copy / "model.safetensors", how)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_checkpoint(copy)


def test_missing_parts(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").rename(copy / "config.away")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_checkpoint(copy)
    (copy / "config.away").rename(copy / "config.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"found pytorch_model\.bin; convert"):
        open_checkpoint(copy)
    with pytest.raises(ValueError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(ValueError, match="is a file"):
        open_checkpoint(copy / "config.json")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_index_may_not_leave_the_directory(copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a file of this directory"):
        open_checkpoint(copy)
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"shard model-00002-of-00002\.safetensors is missing"):
        open_checkpoint(copy)
    index.write_text("{")
    with pytest.raises(ValueError, match="weight_map"):
        open_checkpoint(copy)


def test_quantised_model_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"already quantised or pruned \(quant_method 'gptq'\)"):
        open_checkpoint(copy)


def test_staging_publishes_all_or_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(RuntimeError), Staging(output) as staging:
        (staging.directory / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with Staging(output) as staging:
        (staging.directory / "whole").write_text("x")
        assert not output.exists()
        staging.publish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="exists and is not empty"):
        Staging(output)


def test_second_run_on_one_output_is_refused_and_a_dead_one_cleared(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Staging(output), pytest.raises(ValueError, match="another run"), Staging(output):
        pass
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "left").write_text("by a killed run")
    with Staging(output) as staging:
        assert list(staging.directory.iterdir()) == []
