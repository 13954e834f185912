"""Many sequences in one batch against each of them alone: the same bits, whatever the company."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MORE, PROMPT, SIZES, add_levels, llama_config, save_model

import prune_llm
from prune_llm.batching import Batcher
from prune_llm.device_sampling import DeviceSampler
from prune_llm.generation import generate
from prune_llm.pinned import HostCopy
from prune_llm.plan_runner import PlanRunner
from prune_llm.runners import new_runner, token_bytes
from prune_llm.sampling import DRAWN, SamplingParams
from prune_llm.segments import SCORED_ROWS, BatchLimits, Ran, Runner, Segment
from prune_llm.sequences import SequenceEvent, SequenceRequest
from prune_llm.transformers_runner import TransformersRunner
from prune_llm_kernels import dispatch

VOCABULARY = SIZES["vocab_size"]
PAGE = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PRUNE_LLM_BACKEND", request.param)
    dispatch.backend_for.cache_clear()
    yield request.param
    dispatch.backend_for.cache_clear()


def configs() -> dict[str, tuple[Any, torch.dtype]]:
    from transformers import (
        BloomConfig,
        Gemma3TextConfig,
        GPT2Config,
        MistralConfig,
        MixtralConfig,
        Qwen3Config,
    )

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return {
        "llama": (llama_config(), torch.float32),
        "llama-bfloat16": (llama_config(), torch.bfloat16),
        "mistral-window": (MistralConfig(**SIZES, sliding_window=20), torch.float32),
        "qwen3": (Qwen3Config(**SIZES, head_dim=24), torch.bfloat16),
        "gpt2": (GPT2Config(**gpt2), torch.float32),
        "mixtral": (MixtralConfig(**SIZES, **experts), torch.float32),
        "bloom": (
            BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2),
            torch.float32,
        ),  # knows no longest text
        "gemma3": (Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=20), torch.float32),
    }


PLANNED = ["llama", "llama-bfloat16", "mistral-window", "qwen3"]
OTHERS = ["gpt2", "mixtral", "bloom", "gemma3"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: save_model(folder / name, config, dtype)
        for name, (config, dtype) in configs().items()
    }


def limits(model: Any, pages: int = 64, **changes: Any) -> BatchLimits:
    size = changes.setdefault("page_size", PAGE)
    return BatchLimits(cache_bytes=pages * size * token_bytes(model), **changes)


Events = dict[str, list[SequenceEvent]]


def run(batcher: Batcher, requests: Sequence[SequenceRequest] = ()) -> Events:
    """Every event of the requests and of what the batcher had before, by sequence."""
    for request in requests:
        batcher.add(request)
    found: Events = {}
    while not batcher.idle:
        for event in batcher.step():
            found.setdefault(event.id, []).append(event)
    return found


def answer(events: Sequence[SequenceEvent]) -> list[Any]:
    """What must not depend on company: tokens, and all log-probabilities to the last bit."""
    return [(e.token, e.score, e.prompt, e.finish_reason) for e in events]


def tokens(events: Sequence[SequenceEvent]) -> list[int | None]:
    return [event.token for event in events]


def ask(name: str, ids: Sequence[int], count: int = 9, **changes: Any) -> SequenceRequest:
    """Greedy unless told otherwise; reports the log-probabilities of the whole vocabulary."""
    own = {"level", "logprobs", "prompt_logprobs"} & changes.keys()
    settings = {"logprobs": VOCABULARY} | {key: changes.pop(key) for key in own}
    params = SamplingParams(**{"max_tokens": count, "ignore_eos": True, **changes})
    return SequenceRequest(name, tuple(ids), params, **settings)


def mixed_requests() -> list[SequenceRequest]:
    """Prompts of many lengths, some beginning alike, drawn in different ways."""
    text = PROMPT + MORE
    seeded: dict[str, Any] = {"temperature": 1.5, "seed": 3}
    return [
        ask("short", text[:1], 30),
        ask("page", text[:16]),
        ask("more", text[:17]),
        ask("less", text[:15]),
        ask("seeded", text[:40], 20, **seeded, top_p=0.9),
        ask("again", text[:40], 20, **seeded, presence_penalty=1.0, logit_bias={5: 4.0}),
        ask("two pages", text[:32], 12),
        ask("turned", [9, *text[:40]], 5),
        ask("fork", [*text[:33], 8, 7, 6], 40),
        ask("scored", text[:50], 3, prompt_logprobs=True),
        ask("only scored", text[:35], 0, prompt_logprobs=True),
    ]


def alone(runner: Runner, requests: Sequence[SequenceRequest]) -> dict[str, list[Any]]:
    return {r.id: answer(run(Batcher(runner), [r])[r.id]) for r in requests}


# -- models that run as one plan ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("cpu", name) for name in PLANNED),
        ("reference", "llama"),
        ("reference", "mistral-window"),
    ],
    indirect=["backend"],
)
def test_the_bits_of_an_answer_do_not_depend_on_company(
    checkpoints: dict[str, Path], name: str, backend: str
) -> None:
    model, requests = prune_llm.load(checkpoints[name]), mixed_requests()
    runner = new_runner(model, limits(model))
    assert isinstance(runner, PlanRunner)
    expected = alone(runner, requests)
    for changes in (
        {},
        {"chunk_tokens": 1},
        {"chunk_tokens": 7},
        {"chunk_tokens": 45, "max_rows": 3},
        {"page_size": 32, "pages": 7},
        {"pages": 7, "chunk_tokens": 20},
    ):
        batcher = Batcher(new_runner(model, limits(model, **changes)))
        found = run(batcher, requests)
        for request in requests:
            assert answer(found[request.id]) == expected[request.id], (changes, request.id)
        assert batcher.status.cached_tokens > 0
        assert bool(batcher.status.preemptions) == ("pages" in changes)
        assert batcher.status.pages_held == 0


def test_greedy_tokens_are_those_of_generate(checkpoints: dict[str, Path]) -> None:
    """In float32: generate() runs prompts through other kernels, which round elsewhere."""
    for name in ("llama", "mistral-window"):
        model = prune_llm.load(checkpoints[name])
        found = run(Batcher(new_runner(model, limits(model))), mixed_requests())
        for request in mixed_requests():
            params = request.params
            if params.max_tokens and not params.logit_bias and params.temperature == 0:
                expected = generate(model, list(request.ids), params)
                assert tokens(found[request.id]) == list(expected.token_ids)


def test_log_probabilities_are_those_of_the_model(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    ids = (PROMPT + MORE)[:50]
    biased = ask("a", ids, 1, logprobs=4, prompt_logprobs=True, logit_bias={7: 100.0})
    (event,) = run(Batcher(new_runner(model, limits(model))), [biased])["a"]
    with torch.no_grad():
        expected_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert [score.id for score in event.prompt] == ids
    assert event.prompt[0].logprob is None and event.prompt[0].top == ()
    assert event.token == 7 and event.score is not None
    for score, logprobs_V in zip((*event.prompt[1:], event.score), expected_TV, strict=True):
        values, found = logprobs_V.topk(4)
        assert score.logprob == pytest.approx(float(logprobs_V[score.id]), abs=1e-4)
        assert [token for token, _ in score.top] == found.tolist()
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_only_what_is_asked_is_reported(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    requests = [
        ask("none", PROMPT, 2, logprobs=None),
        ask("own", PROMPT, 2, logprobs=0),
        ask("prompt", PROMPT, 2, logprobs=None, prompt_logprobs=True),
        ask("nothing", PROMPT, 0),
    ]
    found = run(Batcher(new_runner(model, limits(model))), requests)
    assert [e.score for e in found["none"]] == [None, None] and found["none"][0].prompt == ()
    assert [e.score.top for e in found["own"] if e.score] == [(), ()]
    assert len(found["prompt"][0].prompt) == len(PROMPT) and found["prompt"][1].prompt == ()
    assert answer(found["nothing"]) == [(None, None, (), "length")]


@pytest.mark.parametrize("length", [33, 48])
def test_identical_prompts_are_computed_once(checkpoints: dict[str, Path], length: int) -> None:
    """Also where they come together and the first is not done when the second starts."""
    model, ids = prune_llm.load(checkpoints["llama"]), (PROMPT + MORE)[:length]
    for chunk in (256, 20):
        batcher = Batcher(new_runner(model, limits(model, chunk_tokens=chunk)))
        found = run(batcher, [ask(str(n), ids, 4) for n in range(6)])
        own = 1  # of the others: one token on the page behind, or again the last one
        assert batcher.status.rows == length + 5 * own + 6 * 3
        assert [found[str(n)][0].cached_tokens for n in range(6)] == [0, *[length - own] * 5]
        assert len({str(answer(events)) for events in found.values()}) == 1
        assert batcher.status.cached_tokens == 5 * (length - own)
        assert batcher.status.prompt_tokens == 6 * length


def test_a_dense_answer_is_shared_and_a_sparse_one_is_not(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    add_levels(model)
    batcher = Batcher(new_runner(model, limits(model)))
    for level, shared in (("60%", 16), ("dense", 64)):
        first = run(batcher, [ask("first", PROMPT[:20], 60, level=level)])["first"]
        told = [*PROMPT[:20], *(t for t in tokens(first) if t is not None)]
        (event, *_) = run(batcher, [ask("next", told, 2, level="60%")])["next"]
        assert event.cached_tokens == shared


def test_pages_that_were_forgotten_are_computed_again(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    runner = new_runner(model, limits(model, pages=5))
    batcher, expected = Batcher(runner), alone(runner, [ask("a", PROMPT)])
    for other in range(4):
        found = run(batcher, [ask("a", PROMPT), ask("b", [other] * 50, 5)])
        assert answer(found["a"]) == expected["a"]


# -- levels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_levels_in_one_batch(checkpoints: dict[str, Path], name: str, backend: str) -> None:
    """Dense rows keep their bits; sparse ones keep theirs where nothing is summed by channels."""
    model = prune_llm.load(checkpoints[name])
    add_levels(model)
    requests = [
        ask(f"{level} {n}", (PROMPT + MORE)[:n], 20, level=level)
        for level in ("dense", "30%", "60%")
        for n in (20, 35)
    ]
    runner = new_runner(model, limits(model))
    expected = alone(runner, requests)
    for changes in ({}, {"chunk_tokens": 5}, {"pages": 6}):
        batcher = Batcher(new_runner(model, limits(model, **changes)))
        found = run(batcher, requests)
        assert bool(batcher.status.preemptions) == ("pages" in changes)
        for request in requests:
            events = found[request.id]
            if request.level == "dense" or backend == "reference":
                assert answer(events) == expected[request.id], (changes, request.id)
            share = events[-1].active
            if request.level == "dense":
                assert share is None
            else:
                assert share is not None and 0.2 < share < 0.9
    for request in requests:
        generated = generate(model, list(request.ids), request.params, level=request.level)
        assert [token for token, *_ in expected[request.id]] == list(generated.token_ids)


def test_the_active_share_is_that_of_generate(checkpoints: dict[str, Path]) -> None:
    for name in ("llama", "gpt2"):
        model = prune_llm.load(checkpoints[name])
        add_levels(model)
        batcher = Batcher(new_runner(model, limits(model)))
        dense = ask("dense", PROMPT[:9], 20)
        found = run(batcher, [dense, ask("sparse", PROMPT, 12, level="60%")])
        expected = generate(model, PROMPT, max_tokens=12, ignore_eos=True, level="60%")
        assert found["sparse"][-1].active == pytest.approx(expected.statistics.active, abs=0.01)
        assert found["dense"][-1].active is None


def test_levels_are_left_alone_where_nobody_wants_them(checkpoints: dict[str, Path]) -> None:
    from prune_llm.channel_linear import ChannelLinear

    model = prune_llm.load(checkpoints["llama"])
    add_levels(model)
    runner = new_runner(model, limits(model, levels=False))
    assert runner.levels == ("dense",)
    assert not any(isinstance(module, ChannelLinear) for module in model.modules())
    assert new_runner(model, limits(model)).levels == ("dense", "30%", "60%")
    assert any(isinstance(module, ChannelLinear) for module in model.modules())


# -- all other models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run_alone_in_company(checkpoints: dict[str, Path], name: str) -> None:
    model, requests = prune_llm.load(checkpoints[name]), mixed_requests()
    requests.append(ask("long", (PROMPT + MORE)[:71] + PROMPT[:29], 12, prompt_logprobs=True))
    assert len(requests[-1].ids) > SCORED_ROWS
    runner = new_runner(model, limits(model))
    assert isinstance(runner, TransformersRunner)
    expected = alone(runner, requests)
    for changes in ({}, {"chunk_tokens": 1, "max_rows": 4}, {"pages": 7}):
        batcher = Batcher(new_runner(model, limits(model, **changes)))
        found = run(batcher, requests)
        assert {id: answer(events) for id, events in found.items()} == expected
        assert bool(batcher.status.preemptions) == ("pages" in changes)
        assert batcher.status.pages_held == batcher.status.cached_tokens == 0
        assert not batcher._runner._caches  # type: ignore[attr-defined]
    with torch.no_grad():
        logits_TV = model(torch.tensor([requests[-1].ids])).logits[0]
    (_, _, scores, _), *_ = expected["long"]
    for score, logprobs_V in zip(scores[1:], logits_TV.log_softmax(-1), strict=False):
        assert score.logprob == pytest.approx(float(logprobs_V[score.id]), abs=1e-3)
    for request in requests:
        if len(request.ids) <= SCORED_ROWS and request.params == ask("", [], 20).params:
            answer_ids = generate(model, list(request.ids), request.params).token_ids
            assert [token for token, *_ in expected[request.id]] == list(answer_ids)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_levels_of_other_models(checkpoints: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Packed: experts are then linears of their own."""
    config = prune_llm.PruneConfig(method="magnitude", device="cpu")
    prune_llm.prune(checkpoints[name], config, tmp_path / "packed")
    model = prune_llm.load(tmp_path / "packed")
    add_levels(model)
    requests = [ask(level, PROMPT, 12, level=level) for level in ("dense", "30%", "60%")]
    runner = new_runner(model, limits(model))
    found = run(Batcher(runner), requests)
    assert {id: answer(events) for id, events in found.items()} == alone(runner, requests)
    for request in requests:
        expected = generate(model, PROMPT, request.params, level=request.level)
        assert tokens(found[request.id]) == list(expected.token_ids)


# -- beginnings and ends ------------------------------------------------------------------------


def test_an_end_token_stops_unless_it_is_ignored(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    runner = new_runner(model, limits(model))
    free = tokens(run(Batcher(runner), [ask("a", PROMPT, 12)])["a"])
    last = free[4]
    assert last is not None and last not in free[:4]
    wanted = [ask("stops", PROMPT, 12, ignore_eos=False), ask("goes on", PROMPT, 12)]
    found = run(Batcher(runner, frozenset([last])), wanted)
    assert tokens(found["stops"]) == free[:5] and found["stops"][-1].finish_reason == "stop"
    assert tokens(found["goes on"]) == free and found["goes on"][-1].finish_reason == "length"
    assert [e.finish_reason for e in found["stops"][:-1]] == [None] * 4


def test_cancelling_frees_pages_at_once(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    batcher = Batcher(new_runner(model, limits(model, max_rows=2)))
    text = PROMPT + MORE
    for name, ids in (("a", text[:40]), ("b", text[20:60]), ("c", text[:40])):
        batcher.add(ask(name, ids, 20))
    batcher.step()
    assert (batcher.status.running, batcher.status.waiting) == (2, 1)
    assert batcher.status.pages_held == 6
    assert batcher.cancel("b") and not batcher.cancel("b")
    assert (batcher.status.running, batcher.status.pages_held) == (1, 3)
    batcher.step()  # c joins on the pages of a
    assert (batcher.status.running, batcher.status.pages_held) == (2, 4)
    assert batcher.cancel("a")
    assert batcher.status.pages_held == 3
    assert tokens(run(batcher)["c"]) == tokens(run(batcher, [ask("d", text[:40], 20)])["d"])[1:]


def test_a_draw_without_a_seed_differs(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    requests = [ask(str(n), PROMPT, 20, temperature=2.0) for n in range(3)]
    found = run(Batcher(new_runner(model, limits(model))), requests)
    assert len({str(tokens(events)) for events in found.values()}) == 3


def test_refusals(checkpoints: dict[str, Path]) -> None:
    model = prune_llm.load(checkpoints["llama"])
    batcher = Batcher(new_runner(model, limits(model, pages=4)))
    good = ask("good", PROMPT, 4)
    batcher.add(good)
    for request, message in (
        (good, "id 'good': is already waiting or running"),
        (ask("a", []), "prompt: is empty"),
        (ask("a", [3, 264]), r"prompt: token ids must lie in \[0, 264\)"),
        (ask("a", [-1]), "prompt: token ids must lie in"),
        (ask("a", PROMPT, logit_bias={264: 1.0}), r"logit_bias 264: token ids must lie in"),
        (ask("a", PROMPT, logprobs=265), "logprobs 265: must be between 0 and 264"),
        (ask("a", PROMPT, level="30%"), "level '30%': does not exist; this model has dense"),
        (ask("a", PROMPT, 96), "prompt of 33 tokens and max_tokens 96: the model's context is 128"),
        (ask("a", PROMPT, 33), "prompt of 33 tokens and max_tokens 33: the cache has room for 65"),
        (ask("a", [1] * 65, 1), "prompt of 65 tokens and max_tokens 1: the cache has room for 65"),
    ):
        with pytest.raises(ValueError, match=message):
            batcher.add(request)
    full = run(batcher, [ask("full", PROMPT, 32), ask("scored", [1] * 64, 0, prompt_logprobs=True)])
    assert len(full["good"]) == 4 and len(full["full"]) == 32
    assert len(full["scored"][0].prompt) == 64


def test_limits_that_make_no_sense(checkpoints: dict[str, Path]) -> None:
    for changes, message in (
        ({"max_rows": 0}, "max_rows 0: must be at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
        ({"cache_bytes": 0}, "cache_bytes 0"),
        ({"page_size": 24}, "page_size 24: must be a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchLimits(**changes)
    for name in ("llama", "gpt2"):
        model = prune_llm.load(checkpoints[name])
        least = 64 * token_bytes(model)
        with pytest.raises(ValueError, match=f"cache_bytes {least - 1}: .*at least {least}"):
            new_runner(model, BatchLimits(cache_bytes=least - 1))
        assert new_runner(model, BatchLimits(cache_bytes=least)).pages == 2


def test_bytes_of_a_token(checkpoints: dict[str, Path]) -> None:
    heads, layers = 2, 3
    for name, expected in (
        ("llama", layers * 2 * heads * 16 * 4),
        ("llama-bfloat16", layers * 2 * heads * 16 * 2),
        ("qwen3", layers * heads * (24 + 32) * 2),  # values are padded to 16
        ("gpt2", 2 * 2 * 32 * 4),
    ):
        assert token_bytes(prune_llm.load(checkpoints[name])) == expected


# -- many random operations ---------------------------------------------------------------------


class PagedWords:
    """A runner whose "keys and values" are the tokens: a mixed-up page changes the answer."""

    name, vocabulary, context, shares, piece, draws = "words", 5, 200, True, 1, False
    levels, head = ("dense", "half"), 5

    def __init__(self, pages: int, **changes: Any) -> None:
        self.pages, self.limits = pages, BatchLimits(page_size=PAGE, **changes)
        self._stored: dict[tuple[int, int], tuple[int, bool]] = {}

    def run(self, segments: Sequence[Segment]) -> Ran:
        rows = [(s, s.start + i, t) for s in segments for i, t in enumerate(s.tokens)]
        assert len(rows) <= self.limits.max_rows + self.limits.chunk_tokens
        for segment, position, token in rows:
            place = segment.pages[position // PAGE], position % PAGE
            self._stored[place] = token, segment.level == "half"
        logits = [
            self._logits(segment, segment.start + len(segment.tokens) - back)
            for segment in segments
            for back in range(segment.wanted - 1, -1, -1)
        ]
        assert len(logits) <= self.limits.max_rows + SCORED_ROWS
        shares = [0.5 if segment.level == "half" else None for segment in segments]
        return Ran(torch.tensor(logits).reshape(-1, self.head), lambda: shares)

    def _logits(self, segment: Segment, count: int) -> list[float]:
        seen = [self._stored[segment.pages[p // PAGE], p % PAGE] for p in range(count)]
        digest = blake2b(repr(seen).encode(), digest_size=self.head).digest()
        return [float(byte) for byte in digest]

    def leave(self, slot: int) -> None:
        assert 0 <= slot < self.limits.max_rows


class DrawingWords(PagedWords):
    """Draws as a device does: nothing of a run outlives the next one."""

    draws = True

    def __init__(self, pages: int, **changes: Any) -> None:
        super().__init__(pages, **changes)
        slots, rows = self.limits.max_rows, self.limits.max_rows + SCORED_ROWS
        self._drawing = DeviceSampler(slots, rows, self.head, torch.device("cpu"))
        self._logits_WV = torch.empty(rows, self.head)

    def run(self, segments: Sequence[Segment]) -> Ran:
        latest = self._drawing.latest_S.tolist()
        known = [
            segment._replace(
                tokens=[latest[segment.slot] if t == DRAWN else t for t in segment.tokens]
            )
            for segment in segments
        ]
        self._logits_WV.fill_(-7)
        ran = super().run(known)
        logits_WV = self._logits_WV[: len(ran.logits_WV)]
        logits_WV.copy_(ran.logits_WV)
        slots: list[int | None] = []
        for segment in segments:
            slots += [None] * segment.wanted
            if segment.sampler is not None:
                self._drawing.take(segment.slot, segment.sampler)
                slots[-1] = segment.slot
        if slots == [None] * len(slots) or not self.draws:
            return ran._replace(logits_WV=logits_WV)
        self._drawing.draw(logits_WV, self._drawing.place(slots))
        return Ran(logits_WV, ran.shares, self._drawing.tokens_B[: len(slots)])

    def leave(self, slot: int) -> None:
        super().leave(slot)
        self._drawing.leave(slot)


def random_request(random_: random.Random, name: str) -> SequenceRequest:
    length, most = random_.randrange(1, 90), random_.randrange(40)
    ids = [0] * length if random_.random() < 0.5 else [random_.randrange(2) for _ in range(length)]
    ids = [0] * (length // 2) + ids[length // 2 :]
    level = random_.choice(["dense", "half"])
    settings = random_.choice([{}, {"temperature": 60.0, "seed": 5}])
    scored = random_.random() < 0.2
    asked = {"logprobs": random_.choice([5, None]), "ignore_eos": random_.random() < 0.6}
    return ask(name, ids, most, level=level, prompt_logprobs=scored, **asked, **settings)


@pytest.mark.parametrize("words", [PagedWords, DrawingWords])
@pytest.mark.parametrize("seed", range(12))
def test_random_operations(seed: int, words: type[PagedWords]) -> None:
    """Answers stay those of the sequences alone, and no page is lost."""
    random_ = random.Random(seed)
    changes = {"max_rows": random_.choice([2, 5, 9]), "chunk_tokens": random_.choice([1, 9, 70])}
    runner, ends = words(random_.choice([9, 14, 40]), **changes), frozenset([3])
    batcher, requests, found = Batcher(runner, ends), dict[str, SequenceRequest](), Events()
    for number in range(300):
        action = random_.randrange(6)
        if action == 0 and len(requests) < 40:
            request = random_request(random_, f"request {number}")
            batcher.add(request)
            requests[request.id] = request
        elif action == 1 and requests and random_.random() < 0.4:
            id = random_.choice(list(requests))
            if batcher.cancel(id):
                del requests[id]
                found.pop(id, None)
        else:
            for event in batcher.step():
                found.setdefault(event.id, []).append(event)
        held = {page for s in batcher._scheduler.running for page in s.pages}
        assert batcher.status.pages_held == len(held)
        assert batcher.status.running + batcher.status.waiting == len(batcher._by_id)
    for id, events in run(batcher).items():
        found.setdefault(id, []).extend(events)
    assert (
        batcher.status.pages_held == 0
        and len(batcher._scheduler._free_slots) == runner.limits.max_rows
    )
    assert found.keys() == requests.keys()
    for id, request in requests.items():
        assert found[id][0].cached_tokens < len(request.ids)
        alone_too = Batcher(PagedWords(40, max_rows=1), ends)
        assert answer(found[id]) == answer(run(alone_too, [request])[id])


def test_random_operations_on_a_model(checkpoints: dict[str, Path]) -> None:
    model, random_ = prune_llm.load(checkpoints["llama"]), random.Random(0)
    runner = new_runner(model, limits(model, pages=7, max_rows=5, chunk_tokens=30))
    batcher, added, found = Batcher(runner), list[SequenceRequest](), Events()
    for number in range(300):
        action = random_.randrange(8)
        if action == 0:
            added.append(replace(random_.choice(mixed_requests()), id=str(number), logprobs=3))
            batcher.add(added[-1])
        elif action == 1 and added:
            batcher.cancel(random_.choice(added).id)
        else:
            for event in batcher.step():
                found.setdefault(event.id, []).append(event)
    for id, events in run(batcher).items():
        found.setdefault(id, []).extend(events)
    assert batcher.status.preemptions and batcher.status.cached_tokens
    assert batcher.idle and batcher.status.pages_held == 0
    expected: dict[Any, list[Any]] = {}
    finished = [r for r in added if r.id in found and found[r.id][-1].finish_reason]
    for request in finished:
        key = request.ids, str(request.params)
        if key not in expected:
            expected[key] = alone(runner, [request])[request.id]
        assert answer(found[request.id]) == expected[key]
    assert len(finished) > 15


def test_nobody_joins_without_pages_for_the_whole_prompt() -> None:
    """What is shared with those that run needs none; the first in line is never overtaken."""
    text = [0, 1, 1] * 30
    for second, running in (([1, *text[:60]], 1), ([*text[:60], 1], 3)):
        batcher = Batcher(PagedWords(6, max_rows=4))
        for name, ids in (("first", text[:62]), ("second", second), ("small", [3])):
            batcher.add(ask(name, ids, 2, logprobs=None))
        batcher.step()
        assert (batcher.status.running, batcher.status.preemptions) == (running, 0)
        assert len(run(batcher)) == 3 and batcher.status.preemptions == 0


class Unwell(DrawingWords):
    """Computes no number behind token 4."""

    def __init__(self, draws: bool) -> None:
        super().__init__(12, max_rows=4)
        self.draws = draws

    def _logits(self, segment: Segment, count: int) -> list[float]:
        if 4 in [self._stored[segment.pages[p // PAGE], p % PAGE][0] for p in range(count)]:
            return [math.nan] * self.head
        return super()._logits(segment, count)


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("settings", [{}, {"temperature": 60.0, "seed": 5}])
def test_logits_that_are_not_numbers_end_their_own_sequence(
    settings: dict[str, Any], draws: bool
) -> None:
    text = [0, 1, 1] * 10
    well = ask("well", text, 1, logprobs=None, **settings)
    alone = run(Batcher(PagedWords(12, max_rows=4)), [well])["well"]
    batcher = Batcher(Unwell(draws))
    events = run(batcher, [ask("unwell", [*text, 4], 9, logprobs=None, **settings), well])
    (ended,) = events["unwell"]
    assert ended.token is None and "logits are not numbers" in (ended.error or "")
    assert answer(events["well"]) == answer(alone)
    assert batcher.status.pages_held == 0


class Steps(DrawingWords):
    """Remembers what was run, and what was read behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(12, max_rows=4)
        self.order: list[str] = []
        real = HostCopy.wait

        def wait(copy: HostCopy) -> torch.Tensor:
            self.order.append("read")
            return real(copy)

        monkeypatch.setattr(HostCopy, "wait", wait)

    def run(self, segments: Sequence[Segment]) -> Ran:
        self.order.append(f"{sum(len(segment.tokens) for segment in segments)}")
        return super().run(segments)


def test_a_runner_that_draws_is_a_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row behind the last token is known to be of no use; behind an end token it is not."""
    runner = Steps(monkeypatch)
    batcher = Batcher(runner)
    found = run(batcher, [ask("a", [0, 1], 4, logprobs=None)])
    assert runner.order == ["2", "1", "read", "1", "read", "1", "read", "read"]
    runner.order.clear()
    ended = Batcher(runner, frozenset(t for t in tokens(found["a"])[1:2] if t is not None))
    (event,) = run(ended, [ask("b", [0, 1, tokens(found["a"])[0] or 0], 4, logprobs=None,
                              ignore_eos=False)])["b"]  # fmt: skip
    assert event.finish_reason == "stop" and runner.order == ["3", "1", "read"]
    # what was run for nothing is not taken for the answer of the next request of that name
    runner.order.clear()
    again = run(ended, [ask("b", [0, 1], 1, logprobs=None)])
    assert tokens(again["b"]) == tokens(found["a"])[:1]
    assert runner.order == ["2", "read", "read"]


def test_a_token_without_an_embedding_ends_its_own_sequence() -> None:
    """A model's head may be larger than its embeddings."""

    class OneMore(DrawingWords):
        vocabulary = 4

        def _logits(self, segment: Segment, count: int) -> list[float]:
            first, _ = self._stored[segment.pages[0], 0]
            return [float(token == 4 - first) for token in range(self.head)]

    asked = [ask(name, [first, 1], 4, logprobs=None) for first, name in enumerate("ab")]
    found = run(Batcher(OneMore(12, max_rows=2)), asked)
    (event,) = found["a"]
    assert event.token is None and event.error is not None
    assert event.error.startswith("token 4: the model's head gave it, and it has 4 embeddings")
    assert tokens(found["b"]) == [3] * 4
