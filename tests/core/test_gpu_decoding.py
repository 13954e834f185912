"""The GPU's way through a decode step, followed on the CPU: its plan, its layout, its kernels.

Kernels are interpreted; on a GPU the same step is recorded as a CUDA graph, and nothing else
differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PROMPT, add_levels, llama_config, save_model
from values_read import ValuesRead

import prune_llm
from prune_llm import PruneConfig, generate, prune, stream
from prune_llm.batching import Batcher
from prune_llm.channel_linear import ChannelLinear, packed_linears, use_channels
from prune_llm.decoder import PlanDecoder, new_decoder, recordable, use_device_order
from prune_llm.device_sampling import DeviceSampler, Needs
from prune_llm.generation import decode
from prune_llm.plan_runner import PlanRunner, padded
from prune_llm.runners import new_runner, token_bytes
from prune_llm.running_ahead import RunningAhead, runs_ahead
from prune_llm.sampling import DRAWN, Sampler, SamplingParams
from prune_llm.segments import BatchLimits, Segment
from prune_llm.sequences import SequenceRequest
from prune_llm.speculative import Draft
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
    assert isinstance(decoder.whole_step.blocks.plan, GpuPlan)
    for one, other in zip(found, expected, strict=True):
        assert int(one.argmax()) == int(other.argmax())
        assert torch.allclose(one.float(), other.float(), atol=2e-3 * float(other.std()))
    assert 0.2 < decoder.statistics().active < 0.9


# -- several sequences ------------------------------------------------------------------------

LIMITS = BatchLimits(max_rows=5, chunk_tokens=24, cache_bytes=2**20, page_size=16)


GREEDY = ({},) * 4
# one row beside the other: greedy, drawn, filtered, penalised
MIXED = (
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4},
    {"temperature": 1.1, "repetition_penalty": 1.3, "presence_penalty": 0.5, "seed": 5,
     "logit_bias": {7: 4.0}},
)  # fmt: skip


def requests(levels: tuple[str, ...], asked: Sequence[dict[str, Any]]) -> list[SequenceRequest]:
    """Prompts longer and shorter than a step's, so that they run beside answers."""
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:9], PROMPT[::-1]]
    return [
        SequenceRequest(
            str(place), tuple(ids), SamplingParams(max_tokens=4, ignore_eos=True, **changes),
            levels[place % len(levels)],
        )
        for place, (ids, changes) in enumerate(zip(prompts, asked, strict=True))
    ]  # fmt: skip


def answers(
    runner: Any, asked: Sequence[dict[str, Any]] = GREEDY
) -> tuple[dict[str, list[int]], dict[str, float | None]]:
    """Tokens of each sequence, and the active share of each."""
    batcher = Batcher(runner)
    for request in requests(runner.levels, asked):
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
    real, real_run, ahead = GpuPlan.run, PlanRunner.run, list[bool]()
    monkeypatch.setattr(GpuPlan, "run", lambda plan, rows: (ran.append(rows), real(plan, rows)))

    def run_segments(runner: PlanRunner, segments: Sequence[Segment]) -> Any:
        ahead.extend(segment.tokens[-1] == DRAWN for segment in segments)
        with ValuesRead() as read:
            result = real_run(runner, segments)
        assert read.ops == []  # the device is not waited for
        return result

    monkeypatch.setattr(PlanRunner, "run", run_segments)
    found, shares = answers(runner)
    assert ahead.count(True) == 4 * 3  # every token behind each sequence's first
    assert found == expected
    assert max(n for n in ran if n) > gpu.MAX_ROWS  # prompts beside answers
    assert {padded(n or 0, 29) for n in ran} == set(ran)
    for name, share in expected_shares.items():
        assert shares[name] == (None if share is None else pytest.approx(share, abs=0.02))


def test_tokens_are_drawn_where_the_logits_are(
    packed: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """By seeds, penalties and filters as on the CPU; no logits come to the host."""
    expected, _ = answers(new_runner(prune_llm.load(packed), LIMITS), MIXED)
    request.getfixturevalue("on_gpu")
    runner = gpu_runner(packed, monkeypatch, levels=False)
    looked_at: list[object] = []
    monkeypatch.setattr("prune_llm.outcomes._largest", looked_at.append)
    monkeypatch.setattr(Sampler, "__call__", lambda sampler, logits_V: looked_at.append(logits_V))
    found, _ = answers(runner, MIXED)
    assert found == expected and looked_at == []


def test_scores_come_behind_the_tokens(
    packed: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities need logits on the host: of those that asked, a step later."""
    runner = gpu_runner(packed, monkeypatch, levels=False)
    batcher = Batcher(runner)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for name, logprobs in (("scored", 2), ("plain", None)):
        batcher.add(SequenceRequest(name, tuple(PROMPT[:5]), params, "dense", logprobs))
    tokens: dict[str, list[int | None]] = {"scored": [], "plain": []}
    while not batcher.idle:
        for event in batcher.step():
            tokens[event.id].append(event.token)
            assert (event.score is None) == (event.id == "plain")
            if event.score is not None:
                assert event.score.id == event.score.top[0][0] == event.token
    assert tokens["scored"] == tokens["plain"] and len(tokens["plain"]) == 3


def test_logits_that_are_no_numbers_end_their_own_request(
    packed: Path, on_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = gpu_runner(packed, monkeypatch, levels=False)
    real = DeviceSampler.draw

    def draw(self: DeviceSampler, logits_BV: torch.Tensor, needs: Needs) -> None:
        logits_BV[1:] = torch.nan
        real(self, logits_BV, needs)

    monkeypatch.setattr(DeviceSampler, "draw", draw)
    batcher = Batcher(runner)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    batcher.add(SequenceRequest("good", (7, 8), params, "dense"))
    batcher.add(SequenceRequest("bad", (7, 9), params, "dense"))
    events = [event for _ in range(3) for event in batcher.step()]
    assert [event.error is None for event in events if event.id == "good"] == [True, True]
    (bad,) = [event for event in events if event.id == "bad"]
    assert bad.token is None and "not numbers" in (bad.error or "")
    assert batcher.idle


# -- one sequence, steps ahead of its tokens --------------------------------------------------


@pytest.fixture
def ahead(on_gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answers are run ahead, as on CUDA; which steps were launched."""
    steps: list[int] = []
    real = RunningAhead._launch

    def launch(self: RunningAhead, place: int, logits_V: torch.Tensor) -> None:
        with ValuesRead() as read:
            real(self, place, logits_V)
        assert read.ops == []  # the device is not waited for
        steps.append(place)

    monkeypatch.setattr(RunningAhead, "_launch", launch)
    return steps


def on_device(packed: Path) -> Any:
    model = prune_llm.load(packed)
    use_channels(model, packed_linears(model))
    return model


@pytest.mark.parametrize("changes", MIXED, ids=["greedy", "drawn", "filtered", "penalised"])
def test_running_ahead_gives_the_tokens_of_the_cpu(
    packed: Path, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    asked: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True, **changes}
    expected = generate(prune_llm.load(packed), PROMPT[:6], tokenizer=Letters(), **asked)
    steps = request.getfixturevalue("ahead")
    found = generate(on_device(packed), PROMPT[:6], tokenizer=Letters(), **asked)
    assert found.token_ids == expected.token_ids and found.text == expected.text
    assert found.finish_reason == "length" and steps == [0, 1, 2, 3, 4]


def test_what_was_launched_behind_the_end_is_thrown_away(packed: Path, ahead: list[int]) -> None:
    model = on_device(packed)
    whole = generate(model, PROMPT[:6], tokenizer=Letters(), max_tokens=9, ignore_eos=True)
    ahead.clear()
    launched = []
    decoder = new_decoder(model, 64)
    ends = frozenset([whole.token_ids[1]])
    found = []
    for piece in decode(decoder, PROMPT[:6], SamplingParams(max_tokens=9), Letters(), ends):
        launched.append(len(ahead))
        found.append(piece.generation)
    assert found[-1].token_ids == whole.token_ids[:2] and found[-1].finish_reason == "stop"
    assert launched == [3, 4]  # two behind the token that is read
    # the decoder goes on behind what was kept
    decoder.step(whole.token_ids[1])
    assert int(decoder.step(whole.token_ids[2]).argmax()) == whole.token_ids[3]


def test_a_token_without_an_embedding_is_refused(packed: Path, ahead: list[int]) -> None:
    decoder = new_decoder(on_device(packed), 64)
    assert isinstance(decoder, PlanDecoder)
    logits_V = decoder.prefill(PROMPT[:3]).clone()
    decoder.parts = replace(decoder.parts, embedding_VD=decoder.parts.embedding_VD[:5])
    logits_V[7] = 1e9
    with pytest.raises(ValueError, match="token 7: the model's head gave it"):
        next(RunningAhead(decoder, Sampler(SamplingParams()), 4).tokens(logits_V))


def test_the_plan_of_the_cpu_does_not_run_ahead(packed: Path) -> None:
    assert not runs_ahead(new_decoder(prune_llm.load(packed), 64))


def test_statistics_are_counted_at_the_end(packed: Path, ahead: list[int]) -> None:
    model = on_device(packed)
    level = add_levels(model).levels[-1].name
    pieces = list(stream(model, PROMPT[:6], tokenizer=Letters(), max_tokens=3, level=level))
    *before, last = [piece.generation.statistics for piece in pieces]
    assert [found.active for found in before] == [None] * len(before)
    assert last.active is not None and 0.2 < last.active < 0.9 and last.level == level


def test_drafting_waits_for_nothing_but_what_was_drafted(packed: Path, on_gpu: None) -> None:
    model = on_device(packed)
    level = add_levels(model).levels[-1].name
    plain = new_decoder(model, 64)
    expected = [plain.prefill(PROMPT[:5]).clone()]
    for _ in range(5):
        expected.append(plain.step(int(expected[-1].argmax())).clone())
    decoder = new_decoder(model, 64, draft=Draft(level, 2))
    found, waits = [decoder.prefill(PROMPT[:5]).clone()], []
    for _ in range(5):
        token = int(found[-1].argmax())
        with ValuesRead() as read:
            found.append(decoder.step(token).clone())
        waits += read.ops
    assert waits == [] and decoder.statistics().drafted >= 2
    for one, other in zip(found, expected, strict=True):
        assert int(one.argmax()) == int(other.argmax())
        assert torch.allclose(one.float(), other.float(), atol=2e-3 * float(other.std()))


class Letters:
    """A tokenizer that writes every token as a letter."""

    def __len__(self) -> int:
        return 10_000

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


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
    assert ran.tokens_W is None  # nobody asked for any


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
