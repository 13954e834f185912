"""Directories made to crash, stall or fill whoever loads them, or to have other files read."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model

import prune_llm
from prune_llm.admission import admit, one_line

WEIGHTS = "model.safetensors"
MOST_SECONDS = 20.0
MOST_BYTES = 400e6


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def bounded(tiny_llama: Path) -> Iterator[None]:
    """A refusal takes neither time nor memory."""
    admit(tiny_llama)  # imports what it needs
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def refused(directory: Path, message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        admit(directory, **settings)
    assert len(str(caught.value)) < 1000


def change(directory: Path, name: str = "config.json", **entries: Any) -> None:
    file = directory / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_what_is_good_is_let_in(model: Path, tmp_path: Path) -> None:
    assert admit(model) == model
    bundled = Path(prune_llm.__file__).parent / "demo" / "model"
    assert admit(bundled) == bundled
    # as in a hub's cache: every file is a link to one elsewhere
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    model.rename(blobs)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert admit(snapshot) == snapshot


def test_what_is_good_is_let_in_whatever_its_kind(tmp_path: Path) -> None:
    from transformers import GPT2Config, MixtralConfig, Qwen2Config

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 96, "num_key_value_heads": 2, "vocab_size": 264}
    configs = {
        "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=264),
        "qwen": Qwen2Config(**sizes, **more),
        "mixtral": MixtralConfig(**sizes, **more, num_local_experts=4),
    }
    for name, config in configs.items():
        save_model(tmp_path / name, config)
        assert admit(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1e300},
        {"text_config": {"num_layers": 10**12}},
        {"num_labels": 10**9},
        {"max_window_layers": 10**9},
        {"num_hidden_layers": 999},
        {"hidden_size": 10**9},
        {"hidden_size": 10**18},
        {"intermediate_size": 10**9},
        {"vocab_size": 10**12},
        {"num_attention_heads": 10**9, "head_dim": 64},
        {"model_type": "mixtral", "num_local_experts": 10**7},
        {"model_type": "gpt2", "max_position_embeddings": 10**9},
    ],
    ids=str,
)
def test_sizes_beyond_the_weights(model: Path, entries: dict[str, Any]) -> None:
    change(model, **entries)
    refused(model, "the weights, which are|the weights are|cannot be loaded")


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": "three"},
        {"hidden_size": None},
        {"hidden_size": -64},
        {"hidden_size": [64]},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"model_type": 7},
        {"model_type": ["llama"]},
        {"model_type": "../../llama"},
        {"architectures": 5, "model_type": "nothing-known"},
        {"hidden_act": "os.system"},
        {"dtype": "float7"},
        {"rope_parameters": "x"},
        {"quantization_config": []},
        {"quantization_config": {"quant_method": "prune_llm", "format_version": 1, "pattern": 5}},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
    ids=str,
)
def test_wrong_types_and_values(model: Path, entries: dict[str, Any]) -> None:
    """Refused before the model is loaded, or by what loads it."""
    change(model, **entries)
    with pytest.raises(ValueError), one_line(model):
        admit(model)
        prune_llm.load(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**6, "{", "\x00", "9" * 10**5, '{"a": 1' + "0" * 10**4 + "}"]
)
def test_json_that_is_none(model: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    refused(model, rf"{name}: not (valid JSON|a JSON object)")


def test_files_that_are_none(model: Path) -> None:
    with (model / "tokenizer.json").open("r+") as file:
        file.truncate(10**12)  # takes no room on disk
    refused(model, r"tokenizer\.json: has 1000000000000 bytes")
    (model / "tokenizer.json").unlink()
    for target in ("/dev/zero", "nowhere"):
        (model / "tokenizer.json").symlink_to(target)
        refused(model, r"tokenizer\.json: is no regular file, or a link that leads nowhere")
        (model / "tokenizer.json").unlink()
    os.mkfifo(model / "chat_template.jinja")
    refused(model, r"chat_template\.jinja: is no regular file")


def header(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    edit(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_headers_that_lie(model: Path) -> None:
    """Beside those of test_checkpoint: bytes that belong to many, numbers that are none."""
    file = model / WEIGHTS
    first, second = list(load_file(file))[:2]
    good = file.read_bytes()

    def many(entries: dict[str, Any]) -> None:
        entries |= {f"copy{n}": entries[first] for n in range(1000)}

    def hole(entries: dict[str, Any]) -> None:
        del entries[second]

    def endless(entries: dict[str, Any]) -> None:
        entries[first]["data_offsets"] = [0, float("inf")]

    def text(entries: dict[str, Any]) -> None:
        entries[first]["shape"] = ["4", 1.5]

    for edit in (many, hole, endless, text):
        header(file, edit)
        refused(model, r"model\.safetensors: .*(damaged|truncated)")
        file.write_bytes(good)
    nested = b"[" * 10**6
    file.write_bytes(len(nested).to_bytes(8, "little") + nested)
    refused(model, "its safetensors header is not JSON")


def test_an_index_that_leads_elsewhere(model: Path) -> None:
    (model / WEIGHTS).rename(model.parent / WEIGHTS)
    index = model / "model.safetensors.index.json"
    for name in (
        "../model.safetensors",
        str(model.parent / WEIGHTS),
        "..",
        "a/../../x.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(model, "is not a file of this directory")


def test_other_files_and_code(model: Path) -> None:
    good = (model / "config.json").read_text()
    change(model, auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')")
    refused(model, "needs code that comes with the model; read it, and give --trust-remote-code")
    # nobody asks for it where transformers has the model itself
    change(model, model_type="llama", auto_map={"AutoModelForCausalLM": "evil.Model"})
    admit(model)
    assert not (model / "ran").exists()
    for entries, message in (
        ({"transformers_weights": "../other.safetensors"}, "names its weights' file"),
        ({"_attn_implementation": "evil/kernel"}, "has _attn_implementation 'evil/kernel'"),
        ({"text_config": {"attn_implementation": "evil/kernel"}}, "has attn_implementation"),
    ):
        (model / "config.json").write_text(good)
        change(model, **entries)
        refused(model, message)
    (model / "config.json").write_text(good)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')
    refused(model, "is an adapter of another model")


class Evil:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._file),)


def test_pickles_are_not_read(model: Path) -> None:
    (model / WEIGHTS).unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        (model / name).write_bytes(pickle.dumps(Evil(model / "ran")))
        refused(model, f"has no {WEIGHTS}")
        with pytest.raises((ValueError, OSError)), one_line(model):
            prune_llm.load(model, use_safetensors=True)
        (model / name).unlink()
    assert not (model / "ran").exists()


@pytest.mark.parametrize("sparse", [False, True])
def test_weights_that_are_missing_or_of_another_shape(model: Path, sparse: bool) -> None:
    """Never random ones in their place."""
    if sparse:
        tensors = load_file(model / WEIGHTS)
        halved = {
            n: t.masked_fill(t.abs() < t.abs().median(), 0)
            for n, t in tensors.items()
            if "_proj" in n
        }
        save_file(tensors | halved, model / WEIGHTS, metadata={"format": "pt"})
        prune_llm.export(model, model.parent / "sparse", "sparse")
        model = model.parent / "sparse"
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        less = {n: t for n, t in tensors.items() if n != name}
        save_file(less, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=rf"lacks 1 weights of LlamaForCausalLM, first '{name}"
        ):
            prune_llm.load(model)
    wide = tensors | {"model.norm.weight": torch.ones(65)}
    save_file(wide, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm\.weight is stored with shape \[65\]"):
        prune_llm.load(model)
    projection = [n for n in tensors if "layers.1.mlp.up_proj" in n]
    assert len(projection) == (3 if sparse else 1), projection
    less = {n: t for n, t in tensors.items() if n not in projection}
    save_file(less, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"first 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        prune_llm.load(model)
