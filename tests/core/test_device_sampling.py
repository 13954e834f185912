"""Tokens drawn on a device: Sampler's, row by row, whoever is beside them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from values_read import ValuesRead

from prune_llm.device_sampling import DeviceSampler, Needs
from prune_llm.sampling import NOTHING, Sampler, SamplingParams, place_of

V, STEPS = 300, 12
CPU = torch.device("cpu")
PROMPT = [5, 9, 9, 17]


def random_params(seed: int) -> SamplingParams:
    """Every setting is inert half of the time."""
    choose = random.Random(seed)

    def some(inert: Any, *others: Any) -> Any:
        return choose.choice([inert] * len(others) + list(others))

    return SamplingParams(
        temperature=some(0.0, 0.3, 1.0, 2.5, 1e-6),
        top_k=some(0, 1, 5, 40, V, V + 7),
        top_p=some(1.0, 0.3, 0.9, 1e-9),
        min_p=some(0.0, 0.05, 0.5, 1.0),
        presence_penalty=some(0.0, 1.5, -1.0),
        frequency_penalty=some(0.0, 0.7, -0.2),
        repetition_penalty=some(1.0, 1.4, 0.8),
        logit_bias=some({}, {3: 5.0, 250: -100.0}),
        seed=seed,
    )


def logits_of(step: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generators = [torch.Generator().manual_seed(1000 * step + row) for row in range(rows)]
    return torch.stack([3 * torch.randn(V, generator=own) for own in generators]).to(dtype)


def drawn_on_device(all_params: list[SamplingParams], dtype: torch.dtype) -> list[list[int]]:
    """Tokens of each row, step by step, all rows together; each is also noted by its sampler."""
    count = len(all_params)
    drawing = DeviceSampler(count, count + 1, V, CPU)
    samplers = [Sampler(params, PROMPT) for params in all_params]
    found: list[list[int]] = [[] for _ in samplers]
    for step in range(STEPS):
        for slot, sampler in enumerate(samplers):
            drawing.take(slot, sampler)
        needs = drawing.place([*range(count), None])
        logits = logits_of(step, count, dtype)
        logits_BV = torch.cat([logits, torch.full_like(logits[:1], torch.nan)])
        with ValuesRead() as read:
            drawing.draw(logits_BV, needs)
        assert read.ops == []
        *tokens, nobody = drawing.tokens_B.tolist()
        assert nobody == NOTHING
        for own, sampler, token in zip(found, samplers, tokens, strict=True):
            own.append(token)
            sampler.note(token)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_those_of_the_host(dtype: torch.dtype) -> None:
    all_params = [random_params(seed) for seed in range(60)]
    found = drawn_on_device(all_params, dtype)
    different = []
    for row, (params, tokens) in enumerate(zip(all_params, found, strict=True)):
        sampler = Sampler(params, PROMPT)
        expected = [sampler(logits_of(step, 60, dtype)[row]) for step in range(STEPS)]
        if expected != tokens:
            different.append(params)
    # equal logits, of which bfloat16 has many, come in another order at the edge of top-k or top-p
    if dtype == torch.bfloat16:
        different = [p for p in different if p.temperature == 0 or not Sampler(p).filters(V)]
    assert different == []


def test_a_row_draws_the_same_whoever_is_beside_it() -> None:
    all_params = [random_params(seed) for seed in range(8)]
    together = drawn_on_device(all_params, torch.float32)
    free = SamplingParams(temperature=1.0, seed=1)
    beside = drawn_on_device([free, *all_params], torch.float32)[0]
    assert beside == drawn_on_device([free], torch.float32)[0]
    assert together == drawn_on_device([*all_params, free], torch.float32)[:8]


def test_a_slot_that_is_taken_again_forgets() -> None:
    drawing = DeviceSampler(1, 1, V, CPU)
    biased = Sampler(SamplingParams(logit_bias={3: 100.0}, presence_penalty=2.0))
    plain = Sampler(SamplingParams(presence_penalty=2.0))
    logits = logits_of(0, 1)
    for sampler in (biased, plain):
        drawing.take(0, sampler)
        drawing.draw(logits, drawing.place([0]))
        expected = 3 if sampler is biased else int(logits.argmax())
        assert drawing.tokens_B.tolist() == [expected]
        drawing.leave(0)


def test_one_that_was_interrupted_goes_on() -> None:
    """Its counts come from the host again."""
    params = SamplingParams(frequency_penalty=2.0)
    whole = drawn_on_device([params], torch.float32)[0]
    sampler = Sampler(params, PROMPT)
    for token in whole[:5]:
        sampler.note(token)
    drawing = DeviceSampler(2, 1, V, CPU)
    drawing.take(1, sampler)
    drawing.draw(logits_of(5, 1), drawing.place([1]))
    assert drawing.tokens_B.tolist() == [whole[5]]


def test_logits_that_are_partly_numbers() -> None:
    params = [SamplingParams(temperature=t, seed=1) for t in (0.0, 1.0)]
    drawing = DeviceSampler(2, 2, V, CPU)
    for slot, one in enumerate(params):
        drawing.take(slot, Sampler(one))
    logits = torch.full((2, V), torch.nan)
    needs = drawing.place([0, 1])
    drawing.draw(logits, needs)
    assert drawing.tokens_B.tolist() == [NOTHING, NOTHING]
    logits[:, 8] = -1.0
    drawing.draw(logits, needs)
    assert drawing.tokens_B.tolist() == [8, 8]
    logits[:, 9] = torch.inf
    drawing.draw(logits, needs)
    assert drawing.tokens_B.tolist() == [9, 9]


def test_what_rows_need() -> None:
    def needs(*changes: dict[str, Any]) -> Needs:
        return Needs.of([Sampler(SamplingParams(**c)) for c in changes], V)

    assert needs() == needs({}, {"top_p": 0.5}) == (False, False, False)
    assert needs({}, {"temperature": 1.0}) == (False, True, False)
    assert needs({"temperature": 1.0, "top_k": V}) == (False, True, False)
    assert needs({"temperature": 1.0, "top_k": 3}) == (False, True, True)
    assert needs({"logit_bias": {1: 1.0}}, {"temperature": 1.0}) == (True, True, False)


def test_places_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    marks = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    found = [int(place_of(float(mark), probabilities)) for mark in marks]
    assert found == [1, 1, 3, 3, 4, 4]
    rows = place_of(marks, 3 * probabilities.expand(6, 6))  # of any sum
    assert rows.tolist() == found
