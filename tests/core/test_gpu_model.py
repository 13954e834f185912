"""What a GPU decodes with, prepared on the CPU: interpreted kernels, a timer that the test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PROMPT, add_levels, llama_config, save_model

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation.decoding import choose_level
from prune_llm.channel_linear import ChannelLinear
from prune_llm.decoder import PlanDecoder
from prune_llm.gpu_model import prepare
from prune_llm.parts import read_parts
from prune_llm_kernels import gpu, gpu_layout, gpu_selection
from prune_llm_kernels.gpu_linears import Linears, SwiGLU


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in ("plan", "channel_weight", "ops"):
        monkeypatch.setattr(f"prune_llm_kernels.{module}.backend_for", lambda device: gpu)
    monkeypatch.setattr("prune_llm_kernels.tokens.supports_rows", lambda x: False)
    monkeypatch.setattr(gpu_selection, "MOST", 1)
    yield


def make(directory: Path, pattern: str) -> Path:
    """One block; q of 256 outputs, k and v of 128, gate and up of 256."""
    config = llama_config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        intermediate_size=256, num_hidden_layers=1,
    )  # fmt: skip
    dense = save_model(directory / "dense", config)
    prune(dense, PruneConfig(method="magnitude", pattern=pattern), directory / "packed")
    return directory / "packed"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("half"), "0.5")


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("nm"), "2:4")


def preferring(monkeypatch: pytest.MonkeyPatch, *wanted: str) -> Callable[[Any], float]:
    """A timer by which the wanted ways are the fastest; it runs what it times."""
    real, names = gpu_selection.ways, dict[int, str]()

    def named(*arguments: Any) -> Any:
        calls = real(*arguments)
        names.update({id(call): way for way, call in calls.items()})
        return calls

    monkeypatch.setattr(gpu_selection, "ways", named)

    def timer(call: Any) -> float:
        call()
        return 1.0 if names[id(call)] in wanted else 2.0

    return timer


def logits(model: Any, level: str, ways: list[dict[str, Any]]) -> tuple[torch.Tensor, PlanDecoder]:
    levels = choose_level(model, level)
    decoder = PlanDecoder(read_parts(model), 32, levels, level, tuple(ways))
    decoder.prefill(PROMPT[:3])
    return decoder.step(PROMPT[3]).clone(), decoder


def operations(decoder: PlanDecoder, kind: type) -> list[Any]:
    plan: Any = decoder.whole_step.blocks.plan
    return [found for found in plan._operations if isinstance(found, kind)]


@pytest.mark.parametrize("level", [False, True], ids=["every input", "a level"])
def test_every_way_gives_the_same_logits(
    packed: Path, level: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, torch.Tensor] = {}
    wanted = ["dense", "packed", *(["joint"] if level else [])]
    for way in wanted:
        model = prune_llm.load(packed)
        name = add_levels(model).levels[-1].name if level else "dense"
        levels = choose_level(model, name)
        with monkeypatch.context() as patch:
            ways = prepare(model, (1,), levels, timer=preferring(patch, way))
        assert {choice["way"] for choice in ways} == {way}
        assert all(choice["seconds"][way] == 1.0 for choice in ways)
        found[way], decoder = logits(model, name, ways)
        assert decoder.statistics().ways == tuple(ways)
        if level:
            active = decoder.statistics().active
            assert active is not None and 0.1 < active < 0.95
            found[f"{way} active"] = torch.tensor(active)
    for way in wanted:
        assert torch.allclose(found[way], found["packed"], atol=1e-4 * float(found[way].std()))
        if level:
            assert found[f"{way} active"] == found["packed active"]


def test_what_shares_an_input_is_one_launch(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune_llm.load(packed)
    name = add_levels(model).levels[-1].name
    ways = prepare(model, (1, 4, 99), choose_level(model, name),
                   timer=preferring(monkeypatch, "joint"))  # fmt: skip
    shapes = [(c["out_features"], c["in_features"], c["rows"]) for c in ways]
    # q, k, v; o; gate and up; down; 99 rows are more than the kernels take
    sizes = [(768, 64), (64, 256), (512, 64)]
    assert shapes == [(O, I, rows) for O, I in sizes for rows in (1, 4)]
    _, decoder = logits(model, name, ways)
    assert [len(op.groups) for op in operations(decoder, Linears)][:-1] == [1, 1, 1]
    (swiglu,) = operations(decoder, SwiGLU)
    assert len(swiglu.linears.groups) == 1 and swiglu.following is not None
    # asked again: not measured again, nothing moved
    weights = [m.channel_weight for m in model.modules() if isinstance(m, ChannelLinear)]
    assert prepare(model, (1, 4), choose_level(model, name)) is ways
    after = [m.channel_weight for m in model.modules() if isinstance(m, ChannelLinear)]
    assert all(a is b for a, b in zip(weights, after, strict=True))


def test_the_model_saved_is_the_model_loaded(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prune_llm.load(packed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare(model, (1,), timer=preferring(monkeypatch, "dense"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_of_four_may_go_by_torch(two_of_four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune_llm.load(two_of_four)
    other = prune_llm.load(two_of_four)
    with monkeypatch.context() as patch:
        prepare(other, (1,), timer=preferring(patch, "packed"))
    before, _ = logits(other, "dense", [])
    # torch's kernels need a GPU: a dense tensor in their place
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda dense: dense.clone())
    ways = prepare(model, (1,), timer=preferring(monkeypatch, "2:4"))
    assert {choice["way"] for choice in ways} == {"2:4"}
    after, _ = logits(model, "dense", ways)
    assert torch.allclose(before, after, atol=1e-4 * float(before.std()))
    weights = [m.channel_weight for m in model.modules() if isinstance(m, ChannelLinear)]
    assert all(w.ways is not None and w.ways.semi_OI is not None for w in weights)
    assert all(w.ways is not None and w.ways.dense_IO is None for w in weights)


def test_where_torch_cannot_nothing_is_offered(two_of_four: Path) -> None:
    model = prune_llm.load(two_of_four)
    prepare(model, (1,), timer=lambda call: (call(), 1.0)[1])
    module = next(m for m in model.modules() if isinstance(m, ChannelLinear))
    copies = gpu_selection.copies_of(module.channel_weight)
    assert copies.semi_OI is None  # no kernel on the CPU
    keep = gpu_layout.channel_keep_mask(module.channel_weight)
    assert gpu_selection.is_2_of_4(keep) and not gpu_selection.is_2_of_4(~keep | keep)


def test_copies_need_memory(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prune_llm.load(packed)
    monkeypatch.setattr("prune_llm.gpu_model._free_bytes", lambda model: 1000)
    ways = prepare(model, (1,), timer=preferring(monkeypatch, "dense"))
    assert {choice["way"] for choice in ways} == {"packed"}
    assert all("no memory for a copy" in choice["note"] for choice in ways)
    assert all(choice["speedup"] == 0.5 for choice in ways)
    weights = [m.channel_weight for m in model.modules() if isinstance(m, ChannelLinear)]
    assert all(w.ways is not None and w.ways.dense_IO is None for w in weights)


def test_other_parts_are_left_to_transformers(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)
    model = prune_llm.load(save_model(tmp_path / "gpt2", config))
    assert prepare(model, (1,)) == []
