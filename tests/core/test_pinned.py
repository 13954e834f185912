"""Values between a GPU and the host: nobody waits before they are needed.

A tensor that says it is a GPU's stands for one; events note what would happen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prune_llm.pinned import HostCopy
from prune_llm.stream_files import Store, Writer
from prune_llm.streams import Stream

happened: list[str] = []


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


class Event:
    def record(self) -> None:
        happened.append("recorded")

    def synchronize(self) -> None:
        happened.append("waited")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    happened.clear()
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, without_pinning(getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "Event", Event)


def without_pinning(make: Any) -> Any:
    def made(*sizes: Any, pin_memory: bool = False, **kind: Any) -> Tensor:
        assert pin_memory  # else a copy would be waited for
        tensor: Tensor = make(*sizes, **kind)
        return tensor

    return made


def on_gpu(values: Tensor) -> Any:
    return values.as_subclass(OnGpu)


def test_a_copy_is_waited_for_when_it_is_read(gpu: None) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    copy = HostCopy(on_gpu(values))
    assert happened == ["recorded"]
    found = copy.wait()
    assert happened == ["recorded", "waited"]
    values.zero_()  # the device goes on
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]] and type(found) is Tensor


def test_on_the_cpu_it_is_the_tensor_itself() -> None:
    values = torch.arange(3)
    assert HostCopy(values).wait() is values


def test_a_stream_does_not_wait_for_what_it_is_given(gpu: None, tmp_path: Any) -> None:
    """The thread that writes waits, and whoever reads."""
    writing: list[Any] = []

    class Later(Writer):
        def submit(self, task: Any, *arguments: Any) -> Any:
            writing.append((task, arguments))

    stream = Stream("pruned", 2, Store(tmp_path, journaled=True, writer=Later()), journaled=True)
    batches = [torch.full((1, 2, 3), float(number)) for number in range(2)]
    for number, batch in enumerate(batches):
        stream.replace(number, on_gpu(batch))
    assert happened == ["recorded", "recorded"]
    for task, arguments in writing:
        task(*arguments)
    assert happened[2:] == ["waited", "waited"]
    assert torch.equal(torch.cat(list(stream)), torch.cat(batches))
    assert stream.file is not None
    assert torch.equal(stream.file.read(1), batches[1])
