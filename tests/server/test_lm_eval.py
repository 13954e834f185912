"""lm-eval's local-completions and local-chat-completions work unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, continuation, encode, following, report
from lm_eval_clients import chat_generations, generations, loglikelihoods
from tiny_models import save_tokenizer

MODEL = "tiny/fake"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def ids_of(text: str, tokenizer: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(tokenizer)(
        text, add_special_tokens=False
    ).input_ids
    return ids


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihoods(server: Any, tokenizer: Path, batch_size: int) -> None:
    from transformers import AutoTokenizer

    context = ids_of("the", tokenizer)
    greedy = AutoTokenizer.from_pretrained(tokenizer).decode([following(context)])
    pairs = [("the", " fox"), ("the", greedy), ("one two", " three")]
    found = loglikelihoods(
        server.url, MODEL, tokenizer, pairs, max_length=256, batch_size=batch_size
    )
    for (before, behind), (logprob, is_greedy) in zip(pairs, found, strict=True):
        have, total, all_greedy = ids_of(before, tokenizer), 0.0, True
        for token in ids_of(behind, tokenizer):
            logprob_of = report(have, token, 1).logprob
            assert logprob_of is not None
            total, all_greedy = total + logprob_of, all_greedy and token == following(have)
            have.append(token)
        assert (logprob, is_greedy) == (pytest.approx(total), all_greedy)
    assert [is_greedy for _, is_greedy in found] == [False, True, False]


def test_generations(server: Any, tokenizer: Path) -> None:
    settings = {"until": ["\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
    found = generations(server.url, MODEL, tokenizer, ["ab", "c"], settings, max_length=256)
    for prompt, text in zip(("ab", "c"), found, strict=True):
        assert text == continuation(ids_of(prompt, tokenizer), 12)


def test_chat_generations(start: Any) -> None:
    key = "a-key-of-the-test-01"
    server = start(FakeEngine(), api_keys=(key,))
    settings = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12}
    found = chat_generations(server.url, MODEL, ["ab", "c"], settings, key=key)
    assert found == [continuation(encode(f"<user>{prompt}"), 12) for prompt in ("ab", "c")]
