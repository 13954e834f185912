"""Weights packed and written beside the work: the same bytes, one block behind, and failures."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from kill_points import content
from tiny_models import llama_config, save_model
from torch import Tensor

from prune_llm import Progress, PruneConfig, prune, saving
from prune_llm.sparse_writer import PackedPart

CONFIG = PruneConfig(method="wanda", device="cpu", samples=4, seq_len=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "it", llama_config())


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(saving, "BESIDE", frozenset({"cpu"}))


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_the_same_bytes(
    form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    found = []
    for name, kinds in (("plain", frozenset()), ("beside", frozenset({"cpu"}))):
        monkeypatch.setattr(saving, "BESIDE", kinds)
        prune(model, replace(CONFIG, format=form), tmp_path / name / "out")
        found.append(content(tmp_path / name / "out"))
    assert found[0] == found[1]


@pytest.mark.usefixtures("beside")
def test_the_next_block_is_calibrated_before_one_is_packed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing waits for the next block's calibration; none of its weights is packed before."""
    add, go, packed = PackedPart.add, threading.Event(), list[tuple[str, str]]()

    def slow(self: PackedPart, name: str, stored: Tensor, transposed: bool) -> None:
        if ".0." in name:
            assert go.wait(60)
        packed.append((name.split(".")[2], threading.current_thread().name))
        add(self, name, stored, transposed)

    def watch(progress: Progress) -> None:
        if (progress.block, progress.phase) == (1, "calibrating"):
            assert all(block != "1" for block, _ in packed)
            go.set()

    monkeypatch.setattr(PackedPart, "add", slow)
    prune(model, CONFIG, tmp_path / "out", watch)
    blocks = [block for block, _ in packed]
    assert blocks == sorted(blocks) and set(blocks) == {"0", "1", "2"}
    assert all(thread.startswith("writer") for _, thread in packed)


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("how", ["raises", "full"])
def test_what_fails_ends_the_run_before_the_next_block_is_written(
    how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, seen = PackedPart.add, list[tuple[int, str]]()

    def broken(self: PackedPart, name: str, stored: Tensor, transposed: bool) -> None:
        if name.startswith("model.layers.1.mlp.up"):
            if how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise ValueError("as if it could not be packed")
        add(self, name, stored, transposed)

    def note(progress: Progress) -> None:
        seen.append((progress.block, progress.phase))

    monkeypatch.setattr(PackedPart, "add", broken)
    error: Any = OSError if how == "full" else ValueError
    with pytest.raises(error, match=r"disk is full|could not be packed") as raised:
        prune(model, CONFIG, tmp_path / "out", note)
    assert (2, "pruned") not in seen
    causes = [raised.value, raised.value.__cause__]
    traces = [cause.__traceback__ for cause in causes if cause is not None]
    assert any("broken" in names(trace) for trace in traces)  # where it came from
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    if how == "raises":  # it would come again: nothing is kept
        assert list(tmp_path.iterdir()) == []
        return
    notes: list[str] = []
    prune(model, CONFIG, tmp_path / "out", resume=True, on_note=notes.append)
    assert notes[0] == "going on: 1 of 3 blocks done before"
    prune(model, CONFIG, tmp_path / "whole" / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def names(trace: Any) -> list[str]:
    found = []
    while trace is not None:
        found.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    return found
