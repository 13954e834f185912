"""Decoding at levels of activation sparsity against the same model with its inputs zeroed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MORE, PROMPT, SIZES, add_levels, llama_config, save_model

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation.decoding import model_levels
from prune_llm.activation.gates import Gates, channel_scales
from prune_llm.activation.levels import ActivationSite, Level, LevelTable
from prune_llm.activation.sites import table_sites
from prune_llm.channel_linear import ChannelLinear
from prune_llm.decoder import PlanDecoder, new_decoder, recordable
from prune_llm.generation import generate
from prune_llm.sparse_linear import SparseLinear
from prune_llm.speculative import Draft, SpeculativeDecoder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# a score this close to its threshold may fall on either side by rounding
MARGIN = 1e-5


def gated_logits(model: Any, level: Level, table: LevelTable) -> list[torch.Tensor]:
    """Logits behind the prompt and each further token, by transformers with zeroed inputs.

    Ends before the first token at which rounding may decide what is skipped.
    """
    close: list[bool] = []

    def watch(index: int, _x: torch.Tensor, scores: torch.Tensor, _gated: torch.Tensor) -> None:
        threshold = level.thresholds[index]
        close.append(bool(((scores - threshold).abs() <= MARGIN * threshold).any()))

    gates = Gates(
        table_sites(model, table), channel_scales(model, table), level.thresholds, 0, watch
    )
    with torch.no_grad():
        output = model(input_ids=torch.tensor([PROMPT]), use_cache=True)
        logits, cache = [output.logits[0, -1]], output.past_key_values
        with gates:
            for token in MORE:
                output = model(
                    input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
                )
                if any(close):
                    break
                logits.append(output.logits[0, -1])
    return logits


def decoded_logits(model: Any, level: str) -> tuple[list[torch.Tensor], Any]:
    decoder = new_decoder(model, 128, level)
    logits = [decoder.prefill(PROMPT).clone()]
    logits += [decoder.step(token).clone() for token in MORE]
    return logits, decoder


def configs() -> dict[str, Any]:
    from transformers import GPT2Config, MistralConfig, MixtralConfig, Qwen3Config

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "llama": llama_config(),
        "llama-bias": llama_config(attention_bias=True, mlp_bias=True),
        "mistral-window": MistralConfig(**SIZES, sliding_window=8),
        "qwen3": Qwen3Config(**SIZES, head_dim=24),
        "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "mixtral": MixtralConfig(**SIZES, **experts),
    }


@pytest.fixture(scope="module", params=list(configs()))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    dense = save_model(directory / "dense", configs()[request.param])
    settings = PruneConfig(method="magnitude", pattern="0.5")
    prune(dense, settings, directory / "packed")
    return directory / "packed"


@pytest.mark.parametrize("criterion", ["magnitude", "weight-aware"])
def test_every_token_is_that_of_the_gated_model(pruned: Path, criterion: str) -> None:
    model = prune_llm.load(pruned)
    table = add_levels(model, criterion)
    for level in table.levels:
        expected = gated_logits(model, level, table)
        found, decoder = decoded_logits(model, level.name)
        assert len(expected) > 3
        for one, other in zip(found, expected, strict=False):
            assert torch.allclose(one.float(), other.float(), atol=2e-3 * float(other.std()))
        realised = 1 - decoder.statistics().active
        assert abs(realised - level.sparsity) < 0.12
        assert decoder.statistics().level == level.name
        model = prune_llm.load(pruned)  # the reference runs on unconverted weights
        table = add_levels(model, criterion)


def test_the_dense_level_is_the_model_itself_after_conversion(pruned: Path) -> None:
    model = prune_llm.load(pruned)
    before, _ = decoded_logits(model, "dense")
    add_levels(model)
    decoded_logits(model, "30%")
    assert any(isinstance(module, ChannelLinear) for module in model.modules())
    after, _ = decoded_logits(model, "dense")
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * float(other.std()))


def test_a_converted_model_saves_what_it_was_loaded_from(pruned: Path, tmp_path: Path) -> None:
    model = prune_llm.load(pruned)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_levels(model)
    decoded_logits(model, "60%")
    converted = model.state_dict()
    assert set(converted) == set(state)
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


@pytest.fixture(scope="module")
def dense_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("dense"), llama_config(), dtype=torch.bfloat16)


def test_a_model_that_is_not_pruned_skips_inputs_too(dense_llama: Path) -> None:
    model = prune_llm.load(dense_llama)
    table = add_levels(model)
    model.float()
    expected = gated_logits(model, table.level("60%"), table)
    found, decoder = decoded_logits(model, "60%")
    assert isinstance(decoder, PlanDecoder) and len(expected) > 3
    for one, other in zip(found, expected, strict=False):
        assert torch.allclose(one, other, atol=2e-3 * float(other.std()))


@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.parametrize("draft_level", ["dense", "60%"])
def test_drafted_tokens_are_those_of_the_dense_level(
    dense_llama: Path, tokens: int, draft_level: str
) -> None:
    model = prune_llm.load(dense_llama)
    add_levels(model)
    new_decoder(model, 8, "30%")  # both runs over the same weights
    settings: dict[str, Any] = {"max_tokens": 95, "ignore_eos": True}
    alone = generate(model, PROMPT, **settings, temperature=0.0)
    draft = Draft(draft_level, tokens)
    drafted = generate(model, PROMPT, **settings, temperature=0.0, draft=draft)
    assert drafted.token_ids == alone.token_ids
    statistics = drafted.statistics
    assert statistics.drafted >= statistics.accepted > 0
    if draft_level == "dense":
        assert statistics.accepted == 94 - -(-94 // (tokens + 1))
    sampled = generate(model, PROMPT, **settings, temperature=1.0, seed=3)
    drafted = generate(model, PROMPT, **settings, temperature=1.0, seed=3, draft=draft)
    assert drafted.token_ids == sampled.token_ids


def test_verification_computes_the_very_bits_of_single_steps(dense_llama: Path) -> None:
    model = prune_llm.load(dense_llama)
    add_levels(model)
    expected, _ = decoded_logits(model, "dense")
    decoder = new_decoder(model, 128, "dense", Draft("dense", 4))
    assert isinstance(decoder, SpeculativeDecoder)
    found = [decoder.prefill(PROMPT).clone()] + [decoder.step(t).clone() for t in MORE]
    converted, _ = decoded_logits(model, "dense")
    for one, other in zip(found, converted, strict=True):
        assert torch.equal(one, other)
    assert len(found) == len(expected)


def test_drafted_tokens_without_an_embedding_are_never_taken(dense_llama: Path) -> None:
    model = prune_llm.load(dense_llama)
    add_levels(model)
    decoder = new_decoder(model, 128, "dense", Draft("dense", 3))
    assert isinstance(decoder, SpeculativeDecoder)
    for first in range(100):
        token = int(decoder.prefill([first]).argmax())
        logits_V = decoder.step(token).clone()
        beyond = int(logits_V.argmax())  # drafted behind that token
        if beyond > max(first, token):
            break
    else:
        raise AssertionError("no prompt with such a continuation")
    whole = decoder._decoder
    whole.parts = replace(whole.parts, embedding_VD=whole.parts.embedding_VD[:beyond])
    decoder.prefill([first])
    assert torch.equal(decoder.step(token), logits_V)
    with pytest.raises(ValueError, match=f"token {beyond}: the model's head gave it"):
        decoder.step(beyond)


def test_levels_that_do_not_exist_are_listed(dense_llama: Path) -> None:
    model = prune_llm.load(dense_llama)
    with pytest.raises(ValueError, match=r"'40%': this model has no activation thresholds"):
        new_decoder(model, 8, "40%")
    add_levels(model)
    with pytest.raises(ValueError, match=r"'40%': does not exist; this model has dense, 30%, 60%"):
        new_decoder(model, 8, "40%")
    with pytest.raises(ValueError, match=r"draft_tokens 0: must be between 1 and 15"):
        Draft("30%", 0)
    assert model_levels(model) is not None and recordable(model) is None


def test_thresholds_of_another_model_are_refused(dense_llama: Path) -> None:
    model = prune_llm.load(dense_llama)
    table = add_levels(model).to_json()
    table["sites"][0]["in_features"] = 65
    model.config.quantization_config = {"activation": table}
    with pytest.raises(ValueError, match="they belong to another model"):
        new_decoder(model, 8, "30%")


def test_linears_of_one_input_may_have_thresholds_of_their_own(dense_llama: Path) -> None:
    model = prune_llm.load(dense_llama).float()
    table = add_levels(model)
    sites, thresholds = [], []
    for site, threshold in zip(table.sites, table.level("60%").thresholds, strict=True):
        for place, name in enumerate(site.linears):
            sites.append(ActivationSite(name, (name,), site.in_features))
            thresholds.append(threshold * (1 + 0.25 * place))
    finer = LevelTable("magnitude", tuple(sites), (Level("fine", tuple(thresholds)),))
    model.config.quantization_config = {"activation": finer.to_json()}
    expected = gated_logits(model, finer.level("fine"), finer)
    found, decoder = decoded_logits(model, "fine")
    assert isinstance(decoder, PlanDecoder) and len(expected) > 3
    for one, other in zip(found, expected, strict=False):
        assert torch.allclose(one, other, atol=2e-3 * float(other.std()))


def test_the_weights_that_were_converted_are_gone(pruned: Path) -> None:
    model = prune_llm.load(pruned)
    add_levels(model)
    rows = [weakref.ref(m) for m in model.modules() if isinstance(m, SparseLinear)]
    decoder = new_decoder(model, 64, "60%")
    gc.collect()
    assert rows and not any(ref() is not None for ref in rows)
    assert decoder.statistics().level == "60%"
