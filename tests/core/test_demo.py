"""The bundled model and the stories it was trained on.

What the generator promises (determinism, disjoint splits, sums that add up, pronouns that fit)
and what the model promises (small, loadable, readable, better than a stated perplexity).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prune_llm
from prune_llm.demo import SPLITS, model_path, stories, story, text, train
from prune_llm.demo import stories_words as words
from prune_llm.demo.stories import PLOTS, SEPARATOR, common_cast, split_of
from prune_llm.demo.stories_cast import Teller, counted, with_article

HELD_OUT_PPL_BOUND = 1.45
MAX_MODEL_BYTES = 8_000_000


@pytest.fixture(scope="module")
def train_stories() -> list[str]:
    return stories("train", 1500)


@pytest.fixture(scope="module")
def model() -> Any:
    # from_pretrained leaves a model in evaluation mode
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


def _words(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[A-Za-z']+", text)}


# --- the generator ---------------------------------------------------------------------------


def test_stories_never_change() -> None:
    told = "\n".join([*map(story, range(200)), text("held_out", 20, start=7)])
    assert sha256(told.encode()).hexdigest() == (
        "2f414dd03507dbda6901849923aeec6148a75e31a53ace78337b2dbbb1fc99a8"
    )


def test_start_selects_the_same_stories() -> None:
    for split in SPLITS:
        assert stories(split, 5, start=3) == stories(split, 8)[3:]


def test_text_has_one_separator_line_between_stories() -> None:
    assert text("train", 4).split(f"\n{SEPARATOR}\n") == stories("train", 4)


def test_splits_share_no_story() -> None:
    told = {split: set(stories(split, 500)) for split in SPLITS}
    assert all(split_of(text) == split for split, texts in told.items() for text in texts)
    assert len(set.union(*told.values())) == sum(len(texts) for texts in told.values())
    # and hardly any is told twice
    assert all(len(texts) >= 499 for texts in told.values())


def test_unknown_split_names_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, calibration, held_out"):
        stories("test", 1)
    with pytest.raises(ValueError, match="-1"):
        stories("train", 1, start=-1)


def test_vocabulary_and_length(train_stories: list[str]) -> None:
    assert len(_words(train_stories)) > 1100
    assert len({" ".join(text.split()[-12:]) for text in train_stories}) > 750
    lengths = [len(text.split()) for text in train_stories]
    assert min(lengths) >= 80
    assert max(lengths) <= 200


def test_text_is_clean(train_stories: list[str]) -> None:
    for told in train_stories:
        assert not re.search(r"[{}\[\]|<>_]|  |[.,]{2}|\b(\w+) \1\b(?! and| ate)", told), told
        assert told.count('"') % 2 == 0, told
        assert told[-1] in '."', told
        assert not re.search(r"\. [a-z]", told), told


def test_articles(train_stories: list[str]) -> None:
    for told in train_stories:
        for article, noun in re.findall(r"\b([Aa]n?) (\w+)", told):
            assert f"{article.lower()} {noun}" == with_article(noun), told


def test_pronouns_fit_the_only_gender_in_the_story(train_stories: list[str]) -> None:
    checked = 0
    for told in train_stories:
        female = any(re.search(rf"\b{name}\b", told) for name in words.SHE_NAMES + words.SHE_ELDERS)
        male = any(re.search(rf"\b{name}\b", told) for name in words.HE_NAMES + words.HE_ELDERS)
        # the mother of a lost animal is "her", and so is the deer
        if female == male or re.search("mother|deer", told):
            continue
        checked += 1
        other = r"\b(he|him|his)\b" if female else r"\b(she|her)\b"
        assert not re.search(other, told, re.IGNORECASE), told
    assert checked > 150


def _number(word: str) -> int:
    return words.NUMBERS.index(word.lower())


def _garden_sums(told: str) -> Iterator[tuple[int, int]]:
    if match := re.search(r"We had (\w+) .*?, and (\w+) were eaten,.* So there are (\w+)", told):
        total, eaten, left = map(_number, match.groups())
        yield total - eaten, left
    if rows := re.search(r"made (\w+) rows and put (\w+) into", told):
        seeds = re.search(r"(?:gave \w+|came with) (\w+) [^.]*\.", told)
        assert seeds, told
        yield _number(rows[1]) * _number(rows[2]), _number(seeds[1])


def _shopping_sums(told: str) -> Iterator[tuple[int, int]]:
    coins = re.search(r"(?:Here are|with) (\w+) coins", told)
    first = re.search(r'for (\w+) coins\. |"(\w+) coins," said', told)
    rest = re.search(r"(?:had|and had) (\w+) coins", told)
    if coins and first and rest:
        yield _number(coins[1]) - _number(first[1] or first[2]), _number(rest[1])
    second = re.search(r"(?:That is|cost only) (\w+) coins?\b", told)
    left = re.search(r"I have (\w+) coins?|, [^,]* and (\w+) coins?\.", told)
    if rest and second and left:
        yield _number(rest[1]) - _number(second[1]), _number(left[1] or left[2])


SHARING_STEPS = (
    r"In it there were (\w+)|had (\w+) \w+ in a bag|came back with (\w+)",
    r"gave (\w+) of them|Take (\w+) of my",
    r'Now \w+ had (\w+) |"I have (\w+) \w+," said',
    r"ate (\w+) of the",
    r'counted\. "(\w+),"|there (?:was|were) (\w+) \w+ in the|bag and counted (\w+) ',
)


def _sharing_sums(told: str) -> Iterator[tuple[int, int]]:
    found = [re.search(step, told) for step in SHARING_STEPS]
    if all(found):
        stated = [next(filter(None, match.groups())) for match in found if match]
        had, given, rest, eaten, left = map(_number, stated)
        yield had - given, rest
        yield rest - eaten, left


def test_sums_are_right(train_stories: list[str]) -> None:
    checked = 0
    for told in train_stories:
        for sums in (_garden_sums, _shopping_sums, _sharing_sums):
            for expected, stated in sums(told):
                assert expected == stated, told
                checked += 1
    assert checked > 300


def test_what_was_lost_is_found(train_stories: list[str]) -> None:
    checked = 0
    for told in train_stories:
        lost = re.search(r"the (\w+ (?:toy )?\w+) (?:was gone!|was not there any more)", told)
        if lost:
            assert told.count(lost[1]) >= 2, told
            assert re.search(rf"(It was the|There it was! The) {lost[1]}", told), told
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_read_on_without_gaps(plot: str) -> None:
    """Every template of every plot can be filled from the cast, for many casts."""
    for seed in range(20):
        teller = Teller(seed)
        cast = common_cast(teller)
        cast.update(PLOTS[plot].cast(teller))
        for beat in PLOTS[plot].beats:
            for template in beat:
                assert "{" not in teller.tell(template, cast)


def test_counting_nouns() -> None:
    assert counted(1, words.FOODS[0]) == "one apple"
    assert counted(3, words.FOODS[3]) == "three cherries"


def test_import_is_cheap() -> None:
    """Of the demo itself: its parent is replaced by an empty package."""
    parent = [str(model_path().parent.parent)]
    code = (
        "import sys, types\n"
        "sys.modules['prune_llm'] = types.ModuleType('prune_llm')\n"
        f"sys.modules['prune_llm'].__path__ = {parent}\n"
        "import prune_llm.demo\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


# --- the model -------------------------------------------------------------------------------


def test_size(model: Any) -> None:
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert (model_path() / "model.safetensors").stat().st_size <= MAX_MODEL_BYTES
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 512


def test_special_tokens(model: Any, tokenizer: Any) -> None:
    assert tokenizer("Once").input_ids[0] == tokenizer.bos_token_id
    generation = model.generation_config
    assert generation is not None
    assert generation.bos_token_id == tokenizer.bos_token_id
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_tokenizer_gives_every_text_back(tokenizer: Any) -> None:
    for told in [*stories("held_out", 20), "Zürich, 3 € — naïve\n\ttabs 日本"]:
        assert tokenizer.decode(tokenizer(told).input_ids, skip_special_tokens=True) == told


def test_separator_reads_as_end_and_begin(tokenizer: Any) -> None:
    """A file of `text` tokenized at once is the stream the model was trained on."""
    expected: list[int] = []
    for told in stories("calibration", 3):
        expected += [*tokenizer(told).input_ids, tokenizer.eos_token_id]
    assert tokenizer(text("calibration", 3)).input_ids == expected[:-1]


@torch.no_grad()
def test_held_out_perplexity(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(text("held_out", 60), return_tensors="pt").input_ids[0]
    windows_ST = ids[: len(ids) // 512 * 512].view(-1, 512)
    token_ppl = model(input_ids=windows_ST, labels=windows_ST).loss.exp().item()
    assert token_ppl < HELD_OUT_PPL_BOUND


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["Once upon a time", "Tom was a boy from Oakhill."])
def test_tells_a_readable_story(
    model: Any, tokenizer: Any, train_stories: list[str], prompt: str
) -> None:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=300, do_sample=False)[0]
    assert output[-1] == tokenizer.eos_token_id
    told = tokenizer.decode(output, skip_special_tokens=True)
    assert 60 <= len(told.split()) <= 220
    assert _words([told]) <= _words(train_stories)
    assert told.count('"') % 2 == 0


def test_training_rows_hold_one_story_each(tokenizer: Any) -> None:
    config = train.TrainConfig(batch_tokens=256)
    told = stories("train", 10)
    ids_BT, labels_BT = next(train.rows(tokenizer, told, 64, config))
    assert ids_BT.shape == labels_BT.shape == (4, 64)
    beginnings = {tuple(tokenizer(one).input_ids[:64]) for one in told}
    assert {tuple(row) for row in ids_BT.tolist()} <= beginnings
    ids_BT, labels_BT = next(train.rows(tokenizer, ["Tom was here."] * 4, 64, config))
    length = len(tokenizer("Tom was here.").input_ids) + 1
    assert ids_BT[0, length - 1] == tokenizer.eos_token_id
    assert labels_BT[:, :length].equal(ids_BT[:, :length]) and (labels_BT[:, length:] == -100).all()


def test_training_begins_with_short_rows_and_ends_with_the_stream(tokenizer: Any) -> None:
    config = train.TrainConfig(steps=10, batch_tokens=512, phases=(0.2, 0.3, 0.5))
    batches = list(train.schedule(tokenizer, stories("train", 20), config))
    assert [ids.shape[1] for ids, _ in batches] == [128] * 2 + [256] * 3 + [512] * 5


def test_a_story_keeps_its_names(model: Any, tokenizer: Any) -> None:
    """Continuing held-out beginnings, it speaks of whom they name, and of as many as real stories.

    The model before this one could not: its stories had six names each, real ones have two.
    """
    names = re.compile(rf"\b({'|'.join([*words.SHE_NAMES, *words.HE_NAMES])})\b")
    real = stories("held_out", 20, 11)
    told, kept = [], 0
    for original in real:
        beginning = " ".join(original.split()[:16])
        told.append(beginning + prune_llm.generate(model, beginning, tokenizer=tokenizer).text)
        kept += told[-1].count(names.findall(beginning)[0]) >= 3
    assert kept >= 19
    count = sum(len(set(names.findall(text_))) for text_ in told)
    assert count <= 1.25 * sum(len(set(names.findall(text_))) for text_ in real)
