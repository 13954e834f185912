"""Models that run through transformers on a GPU: in a static cache, or why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PROMPT, SIZES, save_model

import prune_llm
from prune_llm.batching import Batcher
from prune_llm.runners import token_bytes
from prune_llm.sampling import SamplingParams
from prune_llm.segments import BatchLimits
from prune_llm.sequences import SequenceRequest
from prune_llm.transformers_cache import choose_cache
from prune_llm.transformers_decoder import TransformersDecoder
from prune_llm.transformers_runner import TransformersRunner


def configs() -> dict[str, Any]:
    from transformers import GemmaConfig, GPT2Config, MistralConfig

    return {
        "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "gemma": GemmaConfig(**SIZES, head_dim=16),
        "window": MistralConfig(**SIZES, sliding_window=8),
    }


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    known: dict[str, Path] = {}

    def loaded(name: str) -> Any:
        if name not in known:
            known[name] = save_model(tmp_path_factory.mktemp(name) / "model", configs()[name])
        return prune_llm.load(known[name])

    return loaded


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_llm.transformers_cache.wants_static", lambda model: True)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """By the whole forward pass, without a cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", configs())
def test_a_static_cache_gives_the_same_tokens(
    name: str, load: Callable[[str], Any], as_on_gpu: None
) -> None:
    model = load(name)
    decoder = TransformersDecoder(model, "it is another", capacity=len(PROMPT) + 12)
    assert decoder.name == "transformers, static cache (it is another)"
    for prompt in (PROMPT, PROMPT[:2]):  # the second must see nothing of the first
        tokens = [int(decoder.prefill(prompt).argmax())]
        kept = decoder._cache.layers[0].keys
        while len(tokens) < 12:
            tokens.append(int(decoder.step(tokens[-1]).argmax()))
        assert tokens == greedy(model, prompt, 12)
        assert type(decoder._cache).__name__ == "StaticCache"
        if name != "window":  # which shifts its tokens
            assert decoder._cache.layers[0].keys is kept
            assert kept.shape[2] == len(PROMPT) + 12


def test_a_model_without_a_static_cache_says_so(
    load: Callable[[str], Any], as_on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("gpt2")
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    decoder = TransformersDecoder(model, "it is another", capacity=60)
    reason = "dynamic cache: GPT2LMHeadModel has no static one"
    assert decoder.name == f"transformers, {reason} (it is another)"
    tokens = [int(decoder.prefill(PROMPT).argmax())]
    while len(tokens) < 6:
        tokens.append(int(decoder.step(tokens[-1]).argmax()))
    assert tokens == greedy(model, PROMPT, 6)
    assert type(decoder._cache).__name__ == "DynamicCache"
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", True)
    monkeypatch.setattr("transformers.StaticCache.__init__", _refuse)
    assert choose_cache(model, 60).name == f"{reason} (KeyError: 'odd layer')"


def _refuse(*_: Any, **__: Any) -> None:
    raise KeyError("odd layer")


def test_on_a_cpu_nothing_changes(load: Callable[[str], Any]) -> None:
    model = load("gpt2")
    choice = choose_cache(model, 60)
    assert choice.tokens is None and choice.name == "" and choice.new(model) is None
    assert TransformersDecoder(model, "it is another", 60).name == "transformers (it is another)"


@pytest.mark.parametrize(("slots", "name"), [(2, "static cache"), (4, "dynamic cache: a static")])
def test_a_static_cache_for_every_sequence_of_a_batch(
    slots: int, name: str, load: Callable[[str], Any], as_on_gpu: None
) -> None:
    model = load("gpt2")
    budget = 2 * 128 * token_bytes(model)  # two sequences of the whole context
    limits = BatchLimits(max_rows=slots, cache_bytes=budget)
    runner = TransformersRunner(model, "it is another", None, limits)
    assert runner.name.startswith(f"transformers, {name}")
    prompts = {"long": PROMPT * 2, "short": PROMPT[:5], "third": PROMPT[3:9]}  # more than slots
    batcher = Batcher(runner)
    for id, ids in prompts.items():
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        batcher.add(SequenceRequest(id, tuple(ids), params))
    found: dict[str, list[int]] = {}
    while not batcher.idle:
        for event in batcher.step():
            assert event.token is not None
            found.setdefault(event.id, []).append(event.token)
    assert found == {id: greedy(model, ids, 6) for id, ids in prompts.items()}
