"""Timing under load: what runs is what the server runs, and what is counted is what was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, load, prune
from prune_llm.batching import Batcher
from prune_llm.parts import read_parts
from prune_llm.runners import new_runner
from prune_llm.sampling import SamplingParams
from prune_llm.segments import BatchLimits, Ran, Segment
from prune_llm.sequences import SequenceRequest
from prune_llm_eval.decode_speed import step_bytes
from prune_llm_eval.throughput import (
    GENERATE,
    Load,
    ThroughputConfig,
    Variant,
    measure_throughput,
    random_prompts,
    time_runner,
)

VOCABULARY = 264


class Counting:
    """A runner that remembers what it was asked for; its next token is 1 + the last one."""

    name, shares, levels, vocabulary, context, pages = "counting", True, ("dense",), 99, 999, 99
    draws = False

    def __init__(self, limits: BatchLimits, piece: int) -> None:
        self.limits, self.piece, self.runs, self.left = limits, piece, list[list[Segment]](), []

    def run(self, segments: list[Segment]) -> Ran:
        self.runs.append(segments)
        last = [segment.tokens[-1] + 1 for segment in segments if segment.wanted]
        logits_WV = torch.nn.functional.one_hot(torch.tensor(last, dtype=torch.int64), 99)
        active = [0.5 if segment.level == "40%" else None for segment in segments]
        return Ran(logits_WV, lambda: active)

    def leave(self, slot: int) -> None:
        self.left.append(slot)


@pytest.mark.parametrize("piece", [1, 4])
@pytest.mark.parametrize(("context", "chunk"), [(3, 8), (8, 8), (21, 8), (5, 6)])
def test_prompts_then_one_token_of_each(piece: int, context: int, chunk: int) -> None:
    runner = Counting(BatchLimits(max_rows=4, chunk_tokens=chunk, page_size=16), piece)
    prompts = [[10 * slot + place for place in range(context)] for slot in range(3)]
    first, step, active = time_runner(runner, prompts, 4, "40%")  # type: ignore[arg-type]
    assert first > 0 and step > 0 and active == 0.5 and runner.left == [0, 1, 2]
    read = [run for run in runner.runs if run[0].level is None]
    seen: dict[int, list[int]] = {}
    for run in read:
        assert sum(len(segment.tokens) for segment in run) <= chunk
        for segment in run:
            own = seen.setdefault(segment.slot, [])
            assert segment.start == len(own) and segment.start % piece == 0
            own += segment.tokens
            assert segment.wanted == (len(own) == context)
            assert len(own) == context or len(own) % piece == 0
    assert list(seen.values()) == prompts
    steps = runner.runs[len(read) :]
    assert len(steps) == 3, "the first of four tokens is the prompt's"
    for place, run in enumerate(steps):
        assert [segment.slot for segment in run] == [0, 1, 2]
        assert {segment.level for segment in run} == {"40%"}
        assert {segment.start for segment in run} == {context + place}
        assert [s.tokens[0] for s in run] == [prompt[-1] + 1 + place for prompt in prompts]
    pages = [page for segment in steps[-1] for page in segment.pages]
    assert len(pages) == len(set(pages)) and len(pages) * 16 >= 3 * (context + 3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("dense"), llama_config(), torch.bfloat16)


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "out"
    prune(dense, PruneConfig(method="magnitude"), output)
    return output


def test_tokens_are_those_of_the_server(packed: Path) -> None:
    """Greedy answers, token for token, as the batcher draws them."""
    model = load(packed).eval()
    limits = BatchLimits(max_rows=3, chunk_tokens=16, cache_bytes=1 << 20)
    prompts = random_prompts(model, Load(21, 3))
    runner = new_runner(model, limits)
    drawn: list[list[int]] = [[] for _ in prompts]
    real = runner.run

    def run(segments: Any) -> Ran:
        ran = real(segments)
        slots = [segment.slot for segment in segments if segment.wanted]
        for slot, token in zip(slots, ran.logits_WV.max(-1).indices.tolist(), strict=True):
            drawn[slot].append(token)
        return ran

    runner.run = run  # type: ignore[method-assign]
    time_runner(runner, prompts, 7, "dense")
    batcher = Batcher(new_runner(model, limits))
    for slot, ids in enumerate(prompts):
        params = SamplingParams(max_tokens=7, ignore_eos=True)
        batcher.add(SequenceRequest(str(slot), tuple(ids), params))
    expected: dict[str, list[int]] = {}
    while not batcher.idle:
        for event in batcher.step():
            assert event.token is not None
            expected.setdefault(event.id, []).append(event.token)
    assert drawn == [expected[str(slot)] for slot in range(3)]


def test_all_take_turns(dense: Path, packed: Path) -> None:
    plain, sparse = load(dense).eval(), load(packed).eval()
    variants = [Variant("dense", plain), Variant("model", sparse), Variant("t", plain, GENERATE)]
    config = ThroughputConfig(contexts=(5, 20), batches=(1, 3), tokens=4, rounds=2, threads=1)
    buffer = torch.ones(1 << 20, dtype=torch.int64)
    before, seen = torch.get_num_threads(), list[str]()
    loads = config.loads(config.contexts)
    found = measure_throughput(
        variants, loads, config, buffer, lambda what, done, total: seen.append(f"{what} {done}")
    )
    assert loads == [Load(5, 1), Load(5, 3), Load(20, 1)]
    assert len(seen) == 3 and seen[1] == "timing context 5, batch 3 1"
    assert torch.get_num_threads() == before
    assert [(t.variant, t.load) for t in found.timings] == [
        (name, load) for load in loads for name in ("dense", "model", "t")
    ]
    for timing in found.timings:
        assert len(timing.first) == len(timing.step) == 2
        assert min(timing.first + timing.step) > 0 and timing.active is None
        assert (timing.step_bytes is None) == (timing.variant == "t")
    assert all(len(rates) == 2 and min(rates) > 0 for rates in found.bandwidth.values())
    assert found.engines["t"] == "transformers generate"
    dense_bytes, packed_bytes = (
        next(t for t in found.timings if t.variant == name and t.load == Load(5, 3)).step_bytes
        for name in ("dense", "model")
    )
    assert dense_bytes == expected_bytes(plain, rows=3, context=5 + 2)
    assert packed_bytes is not None and packed_bytes < 0.8 * expected_bytes(plain, 3, 7)


def expected_bytes(model: Any, rows: int, context: int) -> int:
    """All linears and the head once, and for each row the keys and values before it."""
    linears = sum(p.nbytes for n, p in model.named_parameters() if "_proj" in n)
    config = model.config
    size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cached = 2 * config.num_hidden_layers * size * context * 2  # keys and values in bfloat16
    return int(linears + model.lm_head.weight.nbytes + rows * cached)


def test_bytes_of_a_level(dense: Path) -> None:
    """Of the blocks' weights what counts; head, keys and values whole."""
    parts = read_parts(load(dense).eval())
    whole, none = step_bytes(parts, 10, 2, 1.0), step_bytes(parts, 10, 2, 0.0)
    assert step_bytes(parts, 10, 2, 0.25) == none + round(0.25 * (whole - none))
    assert none == parts.head.weight.nbytes + 2 * step_cache(parts, 10)


def step_cache(parts: Any, context: int) -> int:
    return step_bytes(parts, context, 1) - step_bytes(parts, 0, 1)


def test_loads() -> None:
    config = ThroughputConfig(batches=(8, 1, 8))
    assert config.loads((64, 16)) == [Load(16, 1), Load(16, 8), Load(64, 1)]
    grid = ThroughputConfig(batches=(8, 1), grid=True)
    assert grid.loads((64, 16)) == [Load(16, 1), Load(16, 8), Load(64, 1), Load(64, 8)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": ()}, "batches: give at least one"),
        ({"batches": (0,)}, "batches 0: must be at least 1"),
        ({"contexts": (-3,)}, "contexts -3"),
        ({"tokens": 1}, "tokens 1: must be at least 2"),
        ({"rounds": 0}, "rounds 0"),
        ({"threads": 0}, "threads 0"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThroughputConfig(**settings)
