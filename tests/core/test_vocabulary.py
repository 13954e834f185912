"""Tokens one by one: their texts, and bytes that together are the text's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prune_llm.generation import AnswerText
from prune_llm.vocabulary import Vocabulary, characters

TEXTS = [
    "the quick brown fox",
    " two  spaces, and one behind ",
    "naïve café — 50 €",
    "你好，世界",
    "🦊👩‍👩‍👧 jumps",
    "a\nb\tc\r\n\x00",
    "<s> is no token here </s>",
]
TRAINING = ["the quick brown fox jumps over the lazy dog", "a café in the naïve world", "你好"] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(TRAINING, vocab_size=300, min_frequency=1, special_tokens=SPECIAL)
    return made._tokenizer


def byte_fallback() -> Any:
    """As Llama 2's: pieces of words behind U+2581, and a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = [*sorted(set("".join(TRAINING)) - {" ", "好"}), "▁"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["th", "the", "▁the", "fo", "fox", "▁fox"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o"), ("fo", "x"), ("▁", "fox")]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *bytes_, *letters, *words])}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def word_piece() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["the", "fox", "jump", "##s", "##ed", "over", "a", "."]
    vocabulary = {piece: i for i, piece in enumerate(["[UNK]", *words])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    return made


def loaded(make: Callable[[], Any], **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=make(), clean_up_tokenization_spaces=False, **special
    )


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_all_tokens_are_the_text(make: Callable[[], Any], text: str) -> None:
    # </s> and the like are then plain letters
    tokenizer = loaded(make)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    vocabulary = Vocabulary(tokenizer)
    spelled = [vocabulary.spell(token) for token in ids]
    raw = b"".join(bytes(part or ()) for _, part in spelled)
    before = b" " if make is byte_fallback else b""  # its tokenizer puts one in front
    assert raw == before + text.encode()
    assert "".join(characters(spelled)) == (before + text.encode()).decode()
    for shown, part in spelled:
        assert part is not None and shown == bytes(part).decode(errors="replace")
    assert len(ids) < len(raw) + 2


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_characters_over_several_tokens(make: Callable[[], Any]) -> None:
    tokenizer = loaded(make)
    ids = tokenizer("好🦊", add_special_tokens=False).input_ids
    vocabulary = Vocabulary(tokenizer)
    inside = [shown for shown, _ in map(vocabulary.spell, ids) if "\ufffd" in shown]
    assert len(inside) >= 4
    names = [vocabulary.name(token) for token in ids]
    assert names[-4:] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>"]
    assert vocabulary.name(tokenizer("fox", add_special_tokens=False).input_ids[-1]).endswith("x")
    # and none of them is sent before it is whole
    answer, texts = AnswerText(tokenizer, (), ()), []
    for number, token in enumerate(ids):
        answer.add(token, "length" if number + 1 == len(ids) else None)
        texts.append(answer.take())
    assert "".join(texts).strip() == "好🦊" and not any("\ufffd" in text for text in texts)


def test_a_character_stands_at_the_token_that_completes_it() -> None:
    spelled = [("a", b"a"), ("\ufffd", b"\xc3"), ("\ufffd", b"\xa9"), ("!", b"!")]
    assert characters(spelled) == ["a", "", "é", "!"]
    # what a special token or the end breaks off is shown as such
    assert characters([*spelled[:2], ("</s>", None), *spelled[2:3]]) == [
        "a", "", "\ufffd</s>", "\ufffd"
    ]  # fmt: skip
    assert characters([*spelled[:2]]) == ["a", "\ufffd"] and characters([]) == []


def test_special_and_added_tokens() -> None:
    tokenizer = loaded(byte_level, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["é", "two words", "星"])
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.spell(tokenizer.eos_token_id) == ("</s>", None)
    # written as they are, not in the letters of the byte-level alphabet
    for text in ("é", "two words", "星"):
        token = tokenizer.convert_tokens_to_ids(text)
        assert vocabulary.spell(token) == (text, tuple(text.encode()))
    outside = len(tokenizer) + 5
    assert (
        vocabulary.spell(outside) == ("", ()) and vocabulary.name(outside) == f"<token {outside}>"
    )


def test_a_tokenizer_without_a_decoder() -> None:
    """Which is legal, and joins the pieces as they are."""

    def bare() -> Any:
        made = word_piece()
        made.decoder = None
        return made

    tokenizer = loaded(bare)
    fox = tokenizer.convert_tokens_to_ids("fox")
    text, raw = Vocabulary(tokenizer).spell(fox)
    assert text.strip() == "fox" and raw == tuple(text.encode())


def test_other_tokenizers_by_what_they_decode() -> None:
    tokenizer = loaded(word_piece)
    ids = tokenizer("the fox jumps over", add_special_tokens=False).input_ids
    vocabulary = Vocabulary(tokenizer)
    assert [vocabulary.spell(token)[0] for token in ids] == [" the", " fox", " jump", "s", " over"]
