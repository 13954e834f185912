"""Decoding against transformers' own generate, text handling, and the `generate` command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, llama_config, save_model

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.decoder import PlanDecoder, new_decoder, recordable
from prune_llm.generation import StopWatch, TextWriter, generate, prompt_ids, stream
from prune_llm.parts import read_parts
from prune_llm.sampling import SamplingParams
from prune_llm.transformers_decoder import TransformersDecoder


def configs() -> dict[str, Any]:
    """Models of Llama's parts, in every variation that the plan knows."""
    from transformers import MistralConfig, Qwen2Config, Qwen3Config

    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    sliding = ["full_attention", "sliding_attention", "sliding_attention"]
    return {
        "llama": llama_config(),
        "llama-mha-tied-bias": llama_config(
            num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
        ),
        "llama3-rope": llama_config(rope_parameters=llama3),
        "mistral": MistralConfig(**SIZES, sliding_window=None),
        "mistral-window": MistralConfig(**SIZES, sliding_window=8),
        "qwen2": Qwen2Config(**SIZES),
        "qwen2-window": Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=8, layer_types=sliding
        ),
        "qwen3": Qwen3Config(**SIZES, head_dim=24),
    }


def others() -> dict[str, Any]:
    """Models that look alike or not at all: they must decode through transformers."""
    from transformers import GemmaConfig, GPT2Config, GraniteConfig, OlmoConfig, Phi3Config

    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    return {
        "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=2, n_positions=128),
        "gemma": GemmaConfig(**SIZES, head_dim=16),
        "granite": GraniteConfig(**SIZES, residual_multiplier=0.22, attention_multiplier=0.1),
        "olmo": OlmoConfig(**SIZES),
        "phi3": Phi3Config(**SIZES, pad_token_id=0),
        "llama-dynamic-rope": llama_config(rope_parameters=dynamic),
    }


PROMPT = list(b"the quick brown fox jumps over it")


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Any]:
    """A pruned model of a configuration, loaded in float32, where greedy tokens are exact."""
    made: dict[str, Any] = {}

    def make(name: str, config: Any) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = save_model(folder / "dense", config)
            prune(source, PruneConfig(method="magnitude"), folder / "sparse")
            made[name] = prune_llm.load(folder / "sparse")
        return made[name]

    return make


@pytest.mark.parametrize("name", configs())
def test_recorded_models_give_the_tokens_of_transformers(
    name: str, sparse_model: Callable[[str, Any], Any]
) -> None:
    model = sparse_model(name, configs()[name])
    assert recordable(model) is None
    decoder = new_decoder(model, 100)
    assert isinstance(decoder, PlanDecoder)
    for prompt in (PROMPT, [7], PROMPT * 2):
        tokens = [int(decoder.prefill(prompt).argmax())]
        while len(tokens) < 30:
            tokens.append(int(decoder.step(tokens[-1]).argmax()))
        assert tokens == greedy_without_end(model, prompt, 30)


def greedy_without_end(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the model's whole forward pass: no cache, no special tokens."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", others())
def test_other_models_decode_through_transformers(
    name: str, sparse_model: Callable[[str, Any], Any]
) -> None:
    model = sparse_model(name, others()[name])
    reason = recordable(model)
    assert reason
    decoder = new_decoder(model, 100)
    assert isinstance(decoder, TransformersDecoder) and reason in decoder.name
    tokens = [int(decoder.prefill(PROMPT).argmax())]
    while len(tokens) < 12:
        tokens.append(int(decoder.step(tokens[-1]).argmax()))
    assert tokens == greedy_without_end(model, PROMPT, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_as_close_as_the_models_own(
    dtype: torch.dtype, sparse_model: Callable[[str, Any], Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "dense", llama_config(), dtype)
    prune(source, PruneConfig(method="magnitude"), tmp_path / "sparse")
    model = prune_llm.load(tmp_path / "sparse")
    exact = prune_llm.load(tmp_path / "sparse", dequantize=True).double()
    decoder = new_decoder(model, 64)
    assert isinstance(decoder, PlanDecoder)
    decoder.prefill(PROMPT[:-1])
    ours_V = decoder.step(PROMPT[-1]).double()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        expected_V = exact(input_ids=ids).logits[0, -1]
        theirs_V = model(input_ids=ids).logits[0, -1].double()
    error, allowed = (ours_V - expected_V).norm(), (theirs_V - expected_V).norm()
    assert error <= 2 * allowed


def test_dense_models_decode_too(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    found = generate(model, PROMPT, max_tokens=20, ignore_eos=True)
    assert list(found.token_ids) == greedy_without_end(model, PROMPT, 20)
    assert found.finish_reason == "length" and found.prompt_tokens == len(PROMPT)
    assert found.decoder == "prune_llm kernels"


def test_the_reference_backend_records_as_well(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_llm_kernels import dispatch

    model = prune_llm.load(tiny_llama)
    expected = generate(model, PROMPT, max_tokens=12, ignore_eos=True).token_ids
    monkeypatch.setenv("PRUNE_LLM_BACKEND", "reference")
    dispatch.backend_for.cache_clear()
    try:
        assert generate(model, PROMPT, max_tokens=12, ignore_eos=True).token_ids == expected
    finally:
        monkeypatch.undo()
        dispatch.backend_for.cache_clear()


def test_seeded_samples_repeat(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "top_p": 0.95}
    one, two, other = (
        generate(model, "abc", seed=seed, **settings).token_ids for seed in (5, 5, 6)
    )
    assert one == two != other


def test_end_of_text_and_context_end_an_answer(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    free = generate(model, PROMPT, max_tokens=30, ignore_eos=True).token_ids
    model.generation_config.eos_token_id = [free[4], 263]
    ended = generate(model, PROMPT, max_tokens=30)
    first = free.index(free[4])
    assert ended.token_ids == free[: first + 1] and ended.finish_reason == "stop"
    whole = generate(model, PROMPT, max_tokens=1000, ignore_eos=True)
    assert len(whole.token_ids) == 128 - len(PROMPT) and whole.finish_reason == "length"
    assert whole.max_tokens == 128 - len(PROMPT) and ended.max_tokens == 30


def test_pieces_make_up_the_text(tiny_llama: Path) -> None:
    pieces = list(stream(tiny_llama, "abc", max_tokens=40, ignore_eos=True, temperature=2, seed=0))
    last = pieces[-1].generation
    assert "".join(piece.text for piece in pieces) == last.text
    assert len(pieces) == len(last.token_ids) == 40
    assert [piece.generation.finish_reason for piece in pieces[:-1]] == [None] * 39


def test_stop_text_ends_the_answer_in_front_of_it(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    settings: dict[str, Any] = {"max_tokens": 60, "temperature": 2.0, "seed": 1, "ignore_eos": True}
    text = generate(model, "abc", **settings).text
    stop = text[20:23]
    stopped = generate(model, "abc", stop=("never", stop), **settings)
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"


def test_bad_prompts(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    for prompt, message in (
        ("", "prompt: is empty"),
        ([], "prompt: is empty"),
        ([1, 99999], "token ids must lie in"),
        ([5] * 128, "prompt of 128 tokens: the model's context is 128"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompt, max_tokens=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens 0: must be at least 1"):
        generate(model, "abc", max_tokens=0)


def test_chat_messages_go_through_the_template(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = prompt_ids([{"role": "user", "content": "hi"}], tokenizer)
    assert tokenizer.decode(ids) == "<user>hi<assistant>"


def test_a_model_whose_logits_differ_is_not_recorded(tiny_llama: Path) -> None:
    model = prune_llm.load(tiny_llama)
    model.model.layers[1].self_attn.scaling = 0.9  # the plan reads it, so this still agrees
    assert recordable(model) is None
    other = prune_llm.load(tiny_llama)
    block = other.model.layers[1]
    forward = block.forward
    block.forward = lambda *a, **k: forward(*a, **k) * 1.5
    assert "computes something else" in str(recordable(other))


def test_too_long_a_prompt_for_the_cache(tiny_llama: Path) -> None:
    decoder = PlanDecoder(read_parts(prune_llm.load(tiny_llama)), 16)
    with pytest.raises(ValueError, match="prompt of 17 tokens: must have between 1 and 16"):
        decoder.prefill([1] * 17)
    decoder.prefill([1] * 16)
    with pytest.raises(ValueError, match="position 16: the row's pages hold 16 tokens"):
        decoder.step(1)


# -- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["plain", "naïve café", "日本語のテキスト", "a👩‍👩‍👧b", "\ufffd x"]
)
def test_characters_of_several_tokens_come_whole(tiny_llama: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt, ids = prompt_ids("é", tokenizer), prompt_ids(text, tokenizer)
    writer = TextWriter(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), prompt)
    pieces = [writer.add(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + writer.finish() == text


def test_the_reference_tokenizer_keeps_its_spaces(reference: Path) -> None:
    """SentencePiece drops the space of a text's first word: decoding token by token must not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(next(reference.glob("*/tokenizer.json")).parent)
    prompt = tokenizer("Once upon a time").input_ids
    whole = tokenizer("Once upon a time there was a little girl. She ran").input_ids
    writer = TextWriter(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), prompt)
    text = "".join(writer.add(token) for token in whole[len(prompt) :])
    assert text == " there was a little girl. She ran"


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_stop_watch(step: int) -> None:
    text, stops = "one two three <end> four", ("<end>", "three <x", "zzz")
    watch = StopWatch(stops)
    shown = ""
    for start in range(0, len(text), step):
        stopped = watch.add(text[start : start + step], last=False)
        shown += watch.take()
        assert "<" not in shown
        if stopped:
            break
    assert shown == watch.text == "one two three " and watch.stopped


def test_stop_watch_releases_a_beginning_that_came_to_nothing() -> None:
    watch = StopWatch(("abcd",))
    watch.add("xabc", last=False)
    assert watch.take() == "x"
    watch.add("e", last=False)
    assert watch.take() == "abce"
    watch.add("ab", last=True)
    assert watch.take() == "ab" and not watch.stopped
    assert SamplingParams(stop=("a",)).stop == ("a",)


# -- the command -----------------------------------------------------------------------------


def test_generate_command(cli: Callable[..., Any], tiny_llama: Path) -> None:
    arguments = ("generate", tiny_llama, "--prompt", "hello", "--max-tokens", 12, "--seed", 1)
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] == 5 and len(found["token_ids"]) <= 12
    printed = cli(*arguments, "--device", "cpu")
    assert found["text"] in printed.stdout and "tokens/s" in printed.stderr
    if not torch.cuda.is_available():  # as "auto" chose
        assert found["device"] == "cpu"
    assert "kernels on cpu)" in printed.stderr


def test_the_device_of_a_model_by_name(tiny_llama: Path) -> None:
    found = generate(tiny_llama, "abc", max_tokens=2, device="cpu")
    assert found.device == "cpu"
    model = prune_llm.load(tiny_llama, device="cpu")
    assert model.device.type == "cpu"
    with pytest.raises(ValueError, match="device 'cpu': the model is loaded already, on cpu"):
        generate(model, "abc", max_tokens=2, device="cpu")
    with pytest.raises(ValueError, match="device 'cpu': device_map 'auto' is given as well"):
        prune_llm.load(tiny_llama, device="cpu", device_map="auto")
    # before anything is read
    with pytest.raises(ValueError, match="device 'cuda:99': this machine has"):
        prune_llm.load("nowhere", device="cuda:99")


def test_auto_takes_the_gpu_where_there_is_one(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def to(model: Any, device: torch.device) -> Any:
        taken.append(device)
        return model

    monkeypatch.setattr("transformers.PreTrainedModel.to", to)
    for asked in ("auto", "cuda:1", "cpu", None):
        prune_llm.load(tiny_llama, device=asked)
    assert taken == [torch.device("cuda"), torch.device("cuda", 1), torch.device("cpu")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "x", "--temperature", "-1"), "temperature -1.0: must be 0"),
        (("--prompt", "x", "--top-p", "0"), "top_p 0.0"),
        (("--prompt", ""), "prompt: is empty"),
        (("--prompt", "x", "--device", "tpu"), "device 'tpu': unknown; choose one of auto, cpu"),
        (("--prompt", "x", "--device", "cuda:99"), "device 'cuda:99': this machine has"),
        (("--prompt", "x", "--chat"), "no chat template"),
        ((), "Missing option '--prompt'"),
    ],
    ids=str,
)
def test_generate_command_refuses(
    cli: Callable[..., Any], tiny_llama: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = cli("generate", tiny_llama, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_an_extension_that_is_not_built_is_one_line(tiny_llama: Path) -> None:
    code = (
        "import sys; sys.modules['prune_llm_kernels._C'] = None\n"
        "from prune_llm.cli import main\n"
        f"main(['generate', {str(tiny_llama)!r}, '--prompt', 'x', '--max-tokens', '2'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "run `pip install .`" in lines[0]
    assert "PRUNE_LLM_BACKEND=reference" in lines[0] and "Traceback" not in done.stderr


def test_a_directory_without_weights_says_so(
    cli: Callable[..., Any], tiny_llama: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    result = cli("generate", tmp_path, "--prompt", "x")
    assert result.exit_code == 2 and "has no model.safetensors" in " ".join(result.stderr.split())
    long = cli("generate", tiny_llama, "--prompt", "x" * 500)
    assert long.exit_code == 2 and "the model's context is 128" in " ".join(long.stderr.split())
