from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_llm.calibration import (
    Source,
    cut_windows,
    load_calibration,
    load_tokenizer,
    read_documents,
    tokenize,
)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def source(name: object, **changes: Any) -> Source:
    settings = {
        "separator": None,
        "samples": 4,
        "seq_len": 16,
        "seed": 0,
        "sampling": "random",
    }
    return Source(str(name), **{**settings, **changes})


def test_windows_are_consecutive_tokens(corpus: Path, tokenizer: Any) -> None:
    ids = tokenizer(corpus.read_text())["input_ids"]
    first = load_calibration(source(corpus, sampling="first"), tokenizer)
    assert first.samples_ST.flatten().tolist() == ids[:64]
    assert first.tokens_available == len(ids)
    every = load_calibration(source(corpus, samples=None), tokenizer)
    assert every.samples_ST.flatten().tolist() == ids[: len(ids) // 16 * 16]


def test_random_windows_follow_the_seed(corpus: Path, tokenizer: Any) -> None:
    one = load_calibration(source(corpus), tokenizer)
    again = load_calibration(source(corpus), tokenizer)
    other = load_calibration(source(corpus, seed=1), tokenizer)
    assert torch.equal(one.samples_ST, again.samples_ST) and one.sha256 == again.sha256
    assert not torch.equal(one.samples_ST, other.samples_ST)
    every = cut_windows(tokenizer(corpus.read_text())["input_ids"], 16, "x").tolist()
    assert all(window in every for window in one.samples_ST.tolist())
    assert len({tuple(window) for window in one.samples_ST.tolist()}) == 4


def test_separator_cuts_documents(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("one\ntwo\n<|story|>\nthree\n<|story|>\n\n<|story|>\nfour <|story|> five\n")
    documents = read_documents(str(file), "<|story|>")
    assert documents == ["one\ntwo", "three", "four <|story|> five"]
    assert len(read_documents(str(file), None)) == 1


def test_special_tokens_start_each_document(reference: Path) -> None:
    tokenizer = load_tokenizer(reference / "stories260k")
    ids, count = tokenize(["Once", "upon"], tokenizer)
    assert count == 2 and ids.count(1) == 2 and ids[0] == 1


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n')
    assert read_documents(str(file), None) == ["one", "two"]
    file.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match=r'line 2: has no string under "text" \(found: body\)'):
        read_documents(str(file), None)
    file.write_text('{"text": "one"\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_documents(str(file), None)


def test_too_short_text_says_both_numbers(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "short.txt"
    file.write_text("ten bytes!")
    with pytest.raises(ValueError, match="has 10 tokens and one sample needs 16"):
        load_calibration(source(file), tokenizer)


def test_unreadable_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 3\)"):
        load_calibration(source(file), tokenizer)
    with pytest.raises(ValueError, match=r"'nowhere\.txt': no such file"):
        load_calibration(source("nowhere.txt"), tokenizer)


def test_dataset_directory(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `datasets` name, here a local directory with two splits."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"{split} line {i} " * 5}) for i in range(50)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    one = load_calibration(source(f"{folder}::test", sampling="first"), tokenizer)
    text = tokenizer.decode(one.samples_ST.flatten().tolist())
    assert text.startswith("test line 0 test line 0")
    shuffled = load_calibration(source(folder), tokenizer)
    again = load_calibration(source(folder), tokenizer)
    assert torch.equal(shuffled.samples_ST, again.samples_ST)
    with pytest.raises(ValueError, match=r"no dataset of that name could be read"):
        load_calibration(source(f"{folder}::nosplit"), tokenizer)


def test_bundled_stories_are_the_calibration_split(tokenizer: Any) -> None:
    from prune_llm.demo import stories

    bundled = load_calibration(source("bundled", samples=10, seq_len=100), tokenizer)
    assert bundled.samples_ST.shape == (10, 100)
    text = tokenizer.decode(bundled.samples_ST.flatten().tolist())
    assert text.startswith(stories("calibration", 1)[0][:60])


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)
