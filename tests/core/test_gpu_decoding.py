"""The GPU's way through a decode step, followed on the CPU: its plan, its layout, its kernels.

Kernels are interpreted; on a GPU the same step is recorded as a CUDA graph, and nothing else
differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PROMPT, add_levels, llama_config, save_model
from torch.utils._python_dispatch import TorchDispatchMode

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.batching import Batcher
from prune_llm.channel_linear import ChannelLinear, packed_linears, use_channels
from prune_llm.decoder import PlanDecoder, new_decoder, recordable, use_device_order
from prune_llm.plan_runner import PlanRunner, padded
from prune_llm.runners import new_runner, token_bytes
from prune_llm.sampling import SamplingParams
from prune_llm.segments import BatchLimits, Segment
from prune_llm.sequences import SequenceRequest
from prune_llm_kernels import gpu
from prune_llm_kernels.gpu_plan import GpuPlan

STEPS = 2


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpu")
    dense = save_model(directory / "dense", llama_config(attention_bias=True, num_hidden_layers=1))
    prune(dense, PruneConfig(method="magnitude", pattern="0.5"), directory / "packed")
    return directory / "packed"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What asks for the backend of the CPU gets the GPU's; packed weights are checked as before."""
    for module in ("plan", "channel_weight", "ops"):
        monkeypatch.setattr(f"prune_llm_kernels.{module}.backend_for", lambda device: gpu)
    # what reads the CPU's layouts without asking
    monkeypatch.setattr("prune_llm_kernels.tokens.supports_rows", lambda x: False)
    yield


def decoded(model: Any, level: str) -> tuple[list[torch.Tensor], Any]:
    decoder = new_decoder(model, 64, level)
    logits = [decoder.prefill(PROMPT[:3]).clone()]
    logits += [decoder.step(int(logits[-1].argmax())).clone() for _ in range(STEPS)]
    return logits, decoder


@pytest.fixture(scope="module")
def expected(packed: Path) -> list[torch.Tensor]:
    """By the CPU's kernels."""
    model = prune_llm.load(packed)
    return decoded(model, add_levels(model).levels[-1].name)[0]


def test_the_step_is_that_of_the_cpu(
    packed: Path, expected: list[torch.Tensor], on_gpu: None
) -> None:
    model = prune_llm.load(packed)
    level = add_levels(model).levels[-1].name
    use_channels(model, packed_linears(model))  # as new_decoder does on CUDA
    assert packed_linears(model) == []
    assert any(isinstance(module, ChannelLinear) for module in model.modules())
    assert recordable(model) is None  # at the level "dense" its plan does what transformers does
    found, decoder = decoded(model, level)
    assert isinstance(decoder, PlanDecoder)
    assert isinstance(decoder._recording.blocks.plan, GpuPlan)
    for one, other in zip(found, expected, strict=True):
        assert int(one.argmax()) == int(other.argmax())
        assert torch.allclose(one.float(), other.float(), atol=2e-3 * float(other.std()))
    assert 0.2 < decoder.statistics().active < 0.9


# -- several sequences ------------------------------------------------------------------------

LIMITS = BatchLimits(max_rows=5, chunk_tokens=24, cache_bytes=2**20, page_size=16)


def requests(levels: tuple[str, ...]) -> list[SequenceRequest]:
    """Prompts longer and shorter than a step's, so that they run beside answers."""
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:9], PROMPT[::-1]]
    return [
        SequenceRequest(
            str(place), tuple(ids), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True),
            levels[place % len(levels)],
        )
        for place, ids in enumerate(prompts)
    ]  # fmt: skip


def answers(runner: Any) -> tuple[dict[str, list[int]], dict[str, float | None]]:
    """Greedy tokens of each sequence, and the active share of each."""
    batcher = Batcher(runner)
    for request in requests(runner.levels):
        batcher.add(request)
    tokens: dict[str, list[int]] = {}
    shares: dict[str, float | None] = {}
    while not batcher.idle:
        for event in batcher.step():
            assert event.token is not None
            tokens.setdefault(event.id, []).append(event.token)
            shares[event.id] = event.active
    return tokens, shares


def gpu_runner(packed: Path, monkeypatch: pytest.MonkeyPatch, levels: bool) -> PlanRunner:
    """As on CUDA: weights in channels, rows padded; what is left of earlier rows is no number."""
    model = prune_llm.load(packed)
    if levels:
        add_levels(model)
    use_channels(model, packed_linears(model))  # as new_runner does on CUDA
    monkeypatch.setattr("prune_llm.plan_runner.records_rows", lambda device: True)
    runner = new_runner(model, LIMITS)
    assert isinstance(runner, PlanRunner) and isinstance(runner._blocks.plan, GpuPlan)
    runner._blocks.x_BD.fill_(torch.nan)
    return runner


@pytest.mark.parametrize("levels", [False, True], ids=["dense", "levels"])
def test_batches_are_those_of_the_cpu(
    packed: Path, monkeypatch: pytest.MonkeyPatch, levels: bool, request: pytest.FixtureRequest
) -> None:
    plain = prune_llm.load(packed)
    if levels:
        add_levels(plain)
    expected, expected_shares = answers(new_runner(plain, LIMITS))
    request.getfixturevalue("on_gpu")
    runner = gpu_runner(packed, monkeypatch, levels)
    assert len(runner.levels) > 1 if levels else runner.levels == ("dense",)
    ran: list[int | None] = []
    real = GpuPlan.run
    monkeypatch.setattr(GpuPlan, "run", lambda plan, rows: (ran.append(rows), real(plan, rows)))
    found, shares = answers(runner)
    assert found == expected
    assert max(n for n in ran if n) > gpu.MAX_ROWS  # prompts beside answers
    assert {padded(n or 0, 29) for n in ran} == set(ran)
    for name, share in expected_shares.items():
        assert shares[name] == (None if share is None else pytest.approx(share, abs=0.02))


def test_rows_of_a_step_come_in_few_numbers() -> None:
    found = [padded(n, 200) for n in range(1, 201)]
    assert all(n <= rows for n, rows in enumerate(found, start=1))
    few = [1, 2, 3, 4, 6, 8, 12, *range(16, 200, 16)]
    assert sorted(set(found)) == [*few, 200]
    assert padded(33, 40) == 40 and padded(5, 5) == 5


def test_a_step_waits_for_the_device_once(
    packed: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a run reads a value of a tensor; the share is read behind the logits."""
    runner = gpu_runner(packed, monkeypatch, levels=True)
    level = runner.levels[-1]
    runner.run([Segment(0, 0, PROMPT[:3], None, 0, [0])])
    with ValuesRead() as read:
        ran = runner.run([Segment(0, 3, [7], level, 1, [0]), Segment(1, 0, [9], None, 1, [1])])
    assert read.ops == []
    active, none = ran.active
    assert active is not None and 0.2 < active < 0.9 and none is None


class ValuesRead(TorchDispatchMode):
    """Records the operations that a GPU's host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_packed_weights_are_converted_first(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the cache is measured, and before the plan is compared."""
    model = prune_llm.load(packed)
    expected = token_bytes(prune_llm.load(packed))
    with monkeypatch.context() as patch:
        cuda = property(lambda model: torch.device("cuda"))
        patch.setattr(type(model), "device", cuda)
        use_device_order(model)
    assert packed_linears(model) == []
    assert token_bytes(model) == expected
