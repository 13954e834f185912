"""Text to calibration samples [S, T]: files, JSONL, datasets, or the bundled stories.

The same functions cut evaluation text into windows, so that both use one tokenisation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "bundled"
Sampling = Literal["random", "first"]
# stories are generated on demand: enough for the samples asked for, a chunk at a time
STORY_CHUNK = 256
SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 [S, T] and where they came from, as the report records it."""

    samples_ST: Tensor
    source: str
    documents: int
    tokens_available: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.samples_ST.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Source:
    """What to read and how to cut it into samples.

    Attributes:
        name: a text or JSONL file, "bundled", or a `datasets` name NAME[:CONFIG[:SPLIT]].
        separator: line between the documents of a text file; None: the file is one document.
        samples: how many windows; None: all of them.
        seq_len: tokens in a window.
        sampling: which of the consecutive windows: "random" by ``seed``, or the "first" ones.
    """

    name: str
    separator: str | None
    samples: int | None
    seq_len: int
    seed: int
    sampling: Sampling


def check_seq_len(seq_len: int | None, context: int) -> None:
    """Raise ValueError for windows longer than the model was made for."""
    if seq_len is not None and seq_len > context:
        raise ValueError(
            f"seq_len {seq_len}: the model's context is {context} tokens; give at most that"
        )


def load_calibration(source: Source, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    """Read, tokenise and cut.

    Raises:
        ValueError: nothing to read, or fewer tokens than one sample needs.
    """
    found = _read_windows(source, tokenizer, source.samples)
    count = len(found.samples_ST)
    if source.samples is None or source.samples >= count:
        return found
    return _chosen(found, _order(source, count)[: source.samples])


def load_apart(
    source: Source, others: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Calibration, Calibration]:
    """``source.samples`` windows, and ``others`` that are none of them.

    Of a file the first are those that `load_calibration` gives. A text too short for all is shared
    out in proportion.

    Raises:
        ValueError: nothing to read, or fewer tokens than two windows need.
    """
    assert source.samples is not None
    wanted = source.samples + others
    found = _read_windows(source, tokenizer, wanted)
    count = len(found.samples_ST)
    if count < 2:
        raise ValueError(
            f"text {source.name!r}: gives one window of {source.seq_len} tokens, and those for "
            "pruning must not be searched on; give more text or a smaller --seq-len"
        )
    own = source.samples if count >= wanted else max(1, count * source.samples // wanted)
    order = _order(source, count)
    return _chosen(found, order[:own]), _chosen(found, order[own : own + others])


def _read_windows(
    source: Source, tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> Calibration:
    """All windows of the text; of an endless one about as many as wanted."""
    stop = None if wanted is None or not _is_endless(source.name) else wanted * source.seq_len
    ids, documents = tokenize(_documents(source), tokenizer, stop)
    windows_ST = cut_windows(ids, source.seq_len, source.name)
    return Calibration(windows_ST, source.name, documents, len(ids))


def _order(source: Source, count: int) -> Tensor:
    """In which windows are taken."""
    if source.sampling == "first":
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(source.seed))


def _chosen(found: Calibration, windows: Tensor) -> Calibration:
    return replace(found, samples_ST=found.samples_ST[windows.sort().values])


def cut_windows(ids: list[int], seq_len: int, name: str) -> Tensor:
    """Consecutive windows, int64 [S, T]; the tokens left over at the end are dropped."""
    count = len(ids) // seq_len
    if count == 0:
        raise ValueError(
            f"text {name!r}: has {len(ids)} tokens and one sample needs {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, stop: int | None = None
) -> tuple[list[int], int]:
    """Token ids of all documents behind each other, each with the special tokens its tokenizer
    adds, and the number of documents read; at least ``stop`` ids where that is given."""
    ids: list[int] = []
    count = 0
    for document in documents:
        ids += tokenizer(document, verbose=False)["input_ids"]  # verbose: no warning on length
        count += 1
        if stop is not None and len(ids) >= stop:
            break
    return ids, count


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{directory}: no tokenizer could be loaded from it ({reason})") from None


def read_documents(name: str, separator: str | None) -> list[str]:
    """The documents of a text or JSONL file, or of a dataset (all of it)."""
    return list(_documents(Source(name, separator, None, 1, 0, "first")))


def _is_endless(name: str) -> bool:
    """Whether to stop reading as soon as there are enough tokens: all but local files."""
    return not Path(name).is_file()


def _documents(source: Source) -> Iterator[str]:
    path = Path(source.name)
    if path.is_file():
        reader = _read_jsonl if path.suffix in {".jsonl", ".json"} else _read_text
        yield from reader(path, source.separator)
    elif source.name == BUNDLED:
        yield from _stories()
    else:
        yield from _dataset(source)


def _stories() -> Iterator[str]:
    from prune_llm.demo import stories

    start = 0
    while True:
        yield from stories("calibration", STORY_CHUNK, start)
        start += STORY_CHUNK


def _read_text(path: Path, separator: str | None) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {str(path)!r}: not UTF-8 (byte {error.start})") from None
    documents = [text] if separator is None else _split_lines(text, separator)
    yield from (document for document in documents if document.strip())


def _split_lines(text: str, separator: str) -> list[str]:
    """Cut at the lines that consist of the separator alone."""
    documents: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip() == separator:
            documents.append([])
        else:
            documents[-1].append(line)
    return ["\n".join(lines).strip() for lines in documents]


def _read_jsonl(path: Path, _separator: str | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_text(line, f"text {str(path)!r} line {number}")


def _json_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); JSONL holds one object a line") from None
    return _record_text(record, where)


def _record_text(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f'{where}: has no string under "text" (found: {keys})')
    return text


def _dataset(source: Source) -> Iterator[str]:
    """NAME[:CONFIG[:SPLIT]] through `datasets`, streamed; shuffled by seed when sampling so."""
    name, _, rest = source.name.partition(":")
    config, _, split = rest.partition(":")
    stream = _open_dataset(name, config or None, split or "train")
    if source.sampling == "random" and source.samples is not None:
        stream = stream.shuffle(seed=source.seed, buffer_size=SHUFFLE_BUFFER)
    for number, record in enumerate(stream):
        text = _record_text(record, f"dataset {source.name!r} record {number}")
        if text.strip():
            yield text


def _looks_like_file(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in {".txt", ".json", ".jsonl"}


def _open_dataset(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    if _looks_like_file(name) and not Path(name).is_dir():
        raise ValueError(f"text {name!r}: no such file")
    logging.set_verbosity_error()  # its retries; the outcome is told in one line
    try:
        stream = load_dataset(name, config, split=split, streaming=True)
        next(iter(islice(stream, 1)), None)  # a wrong name or no network shows itself here
    except Exception as error:  # datasets raises whatever its file systems do
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"calibration {name!r}: no such file, and no dataset of that name could be read "
            f"({type(error).__name__}: {reason})"
        ) from None
    return stream
