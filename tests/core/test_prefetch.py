"""The next block is read beside the work on one: what it gives, its order, and how it fails."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from tiny_models import llama_config, save_model
from torch import Tensor

from prune_llm import PruneConfig, prune
from prune_llm.checkpoint import StoredTensor
from prune_llm.job import Job
from prune_llm.prefetch import Prefetch
from prune_llm.statistics import disable_tf32


def test_reading_goes_on_beside_the_work_and_is_waited_for() -> None:
    go, read = threading.Event(), []

    def slow(name: str) -> Tensor:
        assert go.wait(60)
        read.append((name, threading.current_thread().name))
        return torch.tensor([len(name)])

    ahead = Prefetch(slow)
    ahead.start(1, ["a", "bb"])
    assert read == []  # `start` came back before anything was read
    go.set()
    assert {name: int(value) for name, value in ahead.take(1).items()} == {"a": 1, "bb": 2}
    assert read == [("a", "prefetch"), ("bb", "prefetch")]
    assert ahead.take(1) == {}  # held by nobody but who took it


def test_two_blocks_are_never_read_ahead() -> None:
    ahead = Prefetch(lambda _: torch.zeros(1))
    ahead.start(1, ["a"])
    with pytest.raises(AssertionError, match="one block"):
        ahead.start(2, ["b"])
    assert ahead.take(5) == {}  # another block than the one that was begun
    ahead.start(2, ["b"])
    assert list(ahead.take(2)) == ["b"]


def test_what_reading_raises_is_raised_where_the_block_is_asked_for() -> None:
    def broken(name: str) -> Tensor:
        raise ValueError(f"ends inside tensor {name!r}")

    ahead = Prefetch(broken)
    ahead.start(1, ["a", "b"])
    with pytest.raises(ValueError, match="ends inside tensor 'a'"):
        ahead.take(1)
    assert ahead.take(1) == {}


def test_a_stopped_one_reads_no_further() -> None:
    begun, go, read = threading.Event(), threading.Event(), []

    def slow(name: str) -> Tensor:
        begun.set()
        assert go.wait(60)
        read.append(name)
        return torch.zeros(1)

    ahead = Prefetch(slow)
    ahead.start(1, ["a", "b", "c"])
    assert begun.wait(60)
    reading = ahead._reading
    assert reading is not None
    reading._stopping = True
    go.set()
    ahead.stop()
    assert read == ["a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "it", llama_config(), torch.bfloat16)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Walks read ahead as on a GPU; the tensors that were read by the thread, or outside of it."""
    walk, read = Job.walk, StoredTensor.read
    seen: list[tuple[str, str]] = []

    def ahead(self: Job, survey: bool = False) -> object:
        found = walk(self, survey)
        found.residence.reads_ahead = True
        return found

    def noted(self: StoredTensor) -> Tensor:
        seen.append((self.name, threading.current_thread().name))
        return read(self)

    monkeypatch.setattr(Job, "walk", ahead)
    monkeypatch.setattr(StoredTensor, "read", noted)
    return seen


CONFIG = PruneConfig(method="sparsegpt", device="cpu", samples=4, seq_len=32)


def test_the_same_bytes_as_without(
    model: Path, tmp_path: Path, readers: list[tuple[str, str]]
) -> None:
    prune(model, CONFIG, tmp_path / "ahead")
    in_thread = [name for name, thread in readers if thread == "prefetch"]
    assert {name.split(".")[2] for name in in_thread} == {"1", "2"}
    assert len(set(in_thread)) == len(in_thread)
    elsewhere = len(readers) - len(in_thread)
    readers.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefetch, "start", lambda *_: None)
        prune(model, CONFIG, tmp_path / "plain")
    assert len(readers) == elsewhere + len(in_thread)  # none was read twice
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "ahead" / file.name).read_bytes() == file.read_bytes()
    assert list((tmp_path / "plain").glob("*.safetensors"))


def test_a_shard_that_breaks_behind_the_first_block_ends_the_run(
    model: Path, tmp_path: Path, readers: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = StoredTensor.read

    def damaged(self: StoredTensor) -> Tensor:
        if self.name.startswith("model.layers.2.mlp") and "prefetch" in str(
            threading.current_thread().name
        ):
            raise ValueError(f"{self.file.name}: ends inside tensor {self.name!r}; get it again")
        return read(self)

    monkeypatch.setattr(StoredTensor, "read", damaged)
    with pytest.raises(ValueError, match=r"ends inside tensor 'model\.layers\.2\.mlp"):
        prune(model, CONFIG, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_off_inside_and_as_before_behind(before: bool) -> None:
    flags = torch.backends.cuda.matmul
    found = flags.allow_tf32
    try:
        flags.allow_tf32 = before
        with pytest.raises(KeyError), disable_tf32():
            assert not flags.allow_tf32
            raise KeyError
        assert flags.allow_tf32 is before
    finally:
        flags.allow_tf32 = found
