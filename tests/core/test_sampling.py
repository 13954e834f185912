"""Sampling filters against their definitions, and draws against the distribution."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_llm.sampling import Sampler, SamplingParams, distribution, model_defaults


def logits(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3


def defined(logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [V] by the definition: sort everything, cut, renormalise."""
    scaled_V = logits_V.double() / params.temperature
    order = scaled_V.argsort(descending=True, stable=True)
    if params.top_k:
        order = order[: params.top_k]
    p = scaled_V[order].softmax(0)
    keep = (p.cumsum(0) - p < params.top_p) & (p >= params.min_p * p[0])
    out_V = torch.zeros_like(scaled_V)
    out_V[order[keep]] = p[keep] / p[keep].sum()
    return out_V


@pytest.mark.parametrize("size", [5, 300, 5000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 3},
        {"top_k": 10_000},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"min_p": 0.05},
        {"min_p": 1e-9},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_filters(size: int, settings: dict[str, float], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, **settings)  # type: ignore[arg-type]
    tokens, probabilities = distribution(logits(size), params)
    found_V = torch.zeros(size)
    found_V[tokens] = probabilities
    assert torch.allclose(found_V.double(), defined(logits(size), params), atol=1e-6)
    assert len(tokens.unique()) == len(tokens)


def test_draws_follow_the_distribution() -> None:
    params = SamplingParams(temperature=1.0, top_k=4, seed=3)
    sampler = Sampler(params)
    values = logits(50)
    counts = torch.zeros(50)
    for _ in range(4000):
        counts[sampler(values)] += 1
    expected_V = defined(values, params)
    deviation = (counts / 4000 - expected_V).abs()
    assert float(deviation.max()) < 4 * 0.5 / 4000**0.5
    assert not counts[expected_V == 0].any()


def test_the_seed_decides_the_draws() -> None:
    params = SamplingParams(temperature=1.5, seed=11)
    draws = [[Sampler(params)(logits(100 + i)) for i in range(20)] for _ in range(2)]
    assert draws[0] == draws[1]
    free = SamplingParams(temperature=1.5)
    assert len({tuple(Sampler(free)(logits(100 + i)) for i in range(20)) for _ in range(4)}) > 1


def test_temperature_zero_is_greedy_and_the_lowest_id_wins() -> None:
    assert Sampler(SamplingParams())(torch.tensor([0.0, 2.0, 2.0, 1.0])) == 1


def test_logits_without_a_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="logits are not numbers; check its weights"):
        Sampler(SamplingParams(temperature=1.0, top_p=0.5))(torch.full((5,), torch.nan))
    with pytest.raises(ValueError, match="logits are not numbers"):
        Sampler(SamplingParams())(torch.full((5,), torch.nan))


def test_nan_logits_are_never_drawn() -> None:
    values = torch.tensor([torch.nan, 0.0, torch.nan])
    assert {Sampler(SamplingParams(temperature=1.0))(values) for _ in range(20)} == {1}
    assert Sampler(SamplingParams())(values) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": -1}, "max_tokens -1: must be 0 or more"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": 2.0}, "min_p 2.0"),
        ({"stop": ("",)}, "stop ''"),
    ],
    ids=str,
)
def test_bad_parameters(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)  # type: ignore[arg-type]


def test_model_defaults() -> None:
    assert model_defaults(SimpleNamespace(do_sample=False, temperature=0.3)) == {}
    sampled = SimpleNamespace(do_sample=True, temperature=None, top_k=20, top_p=0.9)
    assert model_defaults(sampled) == {"temperature": 1.0, "top_k": 20, "top_p": 0.9}


def test_bias_and_penalties_by_their_definitions() -> None:
    """Three draws, each against logits adjusted in float64 from the formulas."""
    params = SamplingParams(
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        logit_bias={3: 5.0, 7: -100.0, 11: 4.0},
    )
    prompt, logits_V = (2, 2, 5), logits(300)
    sampler, drawn = Sampler(params, prompt), []
    kept = logits_V.clone()
    for _ in range(12):
        expected = kept.double()
        for token, bias in params.logit_bias.items():
            expected[token] += bias
        for token in {*prompt, *drawn}:
            expected[token] *= 1 / 1.3 if expected[token] > 0 else 1.3
        for token in set(drawn):
            expected[token] -= 0.7 + 0.4 * drawn.count(token)
        drawn.append(sampler(logits_V))
        assert drawn[-1] == int(expected.argmax())
    assert len(set(drawn)) > 3
    assert torch.equal(logits_V, kept)


def test_only_an_argmax_of_the_logits_as_they_are_is_plain() -> None:
    assert Sampler(SamplingParams()).plain
    for changed in (
        {"temperature": 0.5},
        {"presence_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
    ):
        assert not Sampler(SamplingParams(**changed)).plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presence_penalty": 2.5}, r"presence_penalty 2.5: must be in \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: must be above 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias {-1: 1.0}"),
        ({"logit_bias": {1: 101.0}}, "logit_bias {1: 101.0}"),
        ({"seed": -1}, "seed -1: must be in"),
    ],
)
def test_bad_penalties_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)  # type: ignore[arg-type]


ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)
LOGITS = st.lists(ANY | st.floats(-30, 30, width=32), min_size=1, max_size=40)


@given(
    values=LOGITS,
    temperature=st.floats(0, allow_infinity=False),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    top_k=st.integers(0, 50),
    repetition=st.floats(0, exclude_min=True, allow_infinity=False),
    presence=st.floats(-2, 2),
)
def test_whatever_is_asked_a_token_is_drawn(
    values: list[float],
    temperature: float,
    top_p: float,
    min_p: float,
    top_k: int,
    repetition: float,
    presence: float,
) -> None:
    """A server's engine would end over an exception here, and every request with it.

    Only a model that computes no number at all is told so.
    """
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        repetition_penalty=repetition,
        presence_penalty=presence,
        seed=1,
    )
    sampler = Sampler(params, prompt=[0])
    if all(map(math.isnan, values)):
        with pytest.raises(ValueError, match="logits are not numbers"):
            sampler(torch.tensor(values))
        return
    for _ in range(3):
        assert 0 <= sampler(torch.tensor(values)) < len(values)


@pytest.mark.parametrize("settings", [{"top_p": 5e-324}, {"top_p": 1e-50}, {"temperature": 1e-300}])
def test_what_float32_rounds_to_zero_is_greedy(settings: dict[str, float]) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 3, **settings})
    assert Sampler(params)(logits(300)) == int(logits(300).argmax())
