"""The engine that comes with the server, with real models, as clients see it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from lm_eval_clients import chat_generations, generations, loglikelihoods
from serving import Running, ask, metric, running, save_served, until

import prune_llm
from prune_llm.sampling import SamplingParams
from prune_llm_server.embedded import EmbeddedEngine, EngineConfig, _next
from prune_llm_server.encoding import Encoder, Interrupted, interrupted_after
from prune_llm_server.engine import EngineRequest, Failed, TimeLimit
from prune_llm_server.settings import ServerSettings

MODEL = "tiny/fake"  # the name that Running asks for
DEMO = Path(prune_llm.__file__).parent / "demo" / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Running]:
    """A tiny float32 model with levels and a chat template."""
    with _serving(checkpoint) as found:
        yield found


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    """The bundled model, in bfloat16."""
    with _serving(DEMO, max_rows=16, chunk_tokens=32) as found:
        yield found


def _serving(model: Path, **settings: Any) -> Any:
    config = EngineConfig(str(model), MODEL, threads=1, **settings)
    return running(EmbeddedEngine(config, lambda code: None), ServerSettings(port=0))


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


# -- what clients ask -----------------------------------------------------------------------------


def test_greedy_text_is_that_of_generate(real: Running, checkpoint: Path) -> None:
    model = prune_llm.load(checkpoint)
    for prompt, level in [("the quick", "dense"), ("fox", "30%"), ("a lazy dog", "60%")]:
        expected = prune_llm.generate(model, prompt, max_tokens=40, temperature=0, level=level)
        (choice,) = real.complete(prompt=prompt, max_tokens=40, temperature=0, level=level)[
            "choices"
        ]
        assert choice["text"] == expected.text
        assert choice["finish_reason"] == expected.finish_reason


def test_echo_and_logprobs_are_those_of_the_model(real: Running, checkpoint: Path) -> None:
    text = "the quick brown fox"
    with real.openai() as client:
        answer = client.completions.create(
            model=MODEL, prompt=text, max_tokens=5, echo=True, logprobs=3, temperature=0
        )
    (choice,) = answer.choices
    found = choice.logprobs
    assert found is not None and choice.text.startswith(text)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(text)
    ids, model = _ids(checkpoint, text), prune_llm.load(checkpoint)
    drawn = prune_llm.generate(model, ids, max_tokens=5, temperature=0).token_ids
    logprobs_TV = _logprobs(model, [*ids, *drawn])
    assert found.token_logprobs[0] is None
    expected = [float(logprobs_TV[i, token]) for i, token in enumerate([*ids, *drawn][1:])]
    # float32, summed in another order
    assert found.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    for top, logprobs_V in zip(found.top_logprobs[1:], logprobs_TV, strict=False):
        # the token's own is there as well; tokens of one spelling are one entry
        best = logprobs_V.topk(3).values.tolist()
        assert max(top.values()) == pytest.approx(best[0], abs=1e-4) and 2 <= len(top) <= 4


def _ids(checkpoint: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(checkpoint)(text).input_ids
    return ids


def _logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([list(ids)])).logits[0]
    found: torch.Tensor = logits_TV.float().log_softmax(-1)
    return found


def test_choices_stops_and_biases(real: Running) -> None:
    asked = {"prompt": "one", "max_tokens": 24}
    whole = real.complete(**asked, temperature=0)["choices"][0]["text"]
    stop = whole[4:6]
    cut = real.complete(**asked, temperature=0, stop=[stop, "never there"])["choices"][0]
    assert cut == {**cut, "text": whole[: whole.index(stop)], "finish_reason": "stop"}
    many = real.complete(prompt=["one", "two"], n=3, max_tokens=12, seed=5)["choices"]
    assert [choice["index"] for choice in many] == list(range(6))
    assert len({choice["text"] for choice in many}) > 1
    # n answers are those of seeds that follow each other
    second = real.complete(prompt="one", max_tokens=12, seed=6)["choices"][0]["text"]
    assert second == many[1]["text"]
    letters = real.complete(**asked, temperature=0, logit_bias={"40": 100})["choices"][0]["text"]
    assert len(set(letters)) == 1 and len(letters) == 24
    spread = real.complete(
        **asked, temperature=0, logit_bias={"40": 50}, frequency_penalty=2, presence_penalty=2
    )["choices"][0]["text"]
    assert letters[0] in spread and len(set(spread)) > 1


def test_a_seed_draws_the_same_alone_and_in_company(real: Running) -> None:
    def draw(seed: int) -> str:
        body = {"prompt": f"story {seed % 3}", "max_tokens": 30, "seed": seed, "top_p": 0.95}
        text: str = real.complete(**body)["choices"][0]["text"]
        return text

    alone = [draw(seed) for seed in range(12)]
    assert in_parallel(12, draw) == alone
    assert len(set(alone)) == 12


def test_a_stream_is_the_whole_answer_and_its_usage(real: Running) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "the fox", "max_tokens": 200}
    with real.openai() as client:
        whole = client.completions.create(**asked, temperature=0)
        chunks = list(
            client.completions.create(
                **asked, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert len(chunks) > 3  # what comes together is sent together


def test_chat(real: Running) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hé 你好"}],
        "max_completion_tokens": 30,
        "temperature": 0,
    }
    with real.openai() as client:
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        chunks = list(client.chat.completions.create(**asked, stream=True))
    (choice,) = whole.choices
    prompt = "<user>hé 你好<assistant>"
    plain = real.complete(prompt=prompt, max_tokens=30, temperature=0)["choices"][0]
    assert choice.message.content == plain["text"]
    assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt.encode())
    assert choice.logprobs is not None and choice.logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content)
    assert raw.decode(errors="replace") == choice.message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content


def test_levels(real: Running) -> None:
    with real.openai() as client:
        (model,) = client.models.list().data
        assert model.model_extra is not None
        assert model.model_extra["levels"] == ["dense", "30%", "60%"]
        with pytest.raises(openai.BadRequestError, match="this model has: dense, 30%, 60%"):
            client.completions.create(model=MODEL, prompt="x", extra_body={"level": "45%"})
    texts = {
        level: real.complete(prompt="the quick", max_tokens=40, temperature=0, level=level)[
            "choices"
        ][0]["text"]
        for level in ("dense", "30%", "60%")
    }
    assert len(set(texts.values())) == 3
    same = real.complete(prompt="the quick", max_tokens=40, temperature=0, activation_sparsity=0.6)[
        "choices"
    ][0]["text"]
    assert same == texts["60%"]
    assert 'activation_sparsity_count{level="60%"' in real.client.get("/metrics").text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt: is empty; give at least one token"),
        ({"prompt": ["x", ""]}, "prompt: is empty; give at least one token"),
        ({"prompt": "x" * 257}, "maximum context length is 256"),
        ({"prompt": [258]}, "token id 258 is not in the vocabulary"),
        ({"prompt": "x", "max_tokens": 256}, "maximum context length is 256"),
    ],
)
def test_refusals(real: Running, fields: dict[str, Any], message: str) -> None:
    response = real.post("/v1/completions", **fields)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_times_of_the_engine_are_measured(real: Running) -> None:
    real.complete(prompt="x" * 100, max_tokens=20)
    count = metric(real.url, "e2e_request_latency_seconds_count")
    seconds = {}
    for name in ("queue", "prefill", "decode"):
        assert metric(real.url, f"request_{name}_time_seconds_count") == count
        seconds[name] = metric(real.url, f"request_{name}_time_seconds_sum")
    assert 0 < seconds["queue"] < seconds["decode"] and seconds["prefill"] > 0
    assert sum(seconds.values()) < metric(real.url, "e2e_request_latency_seconds_sum")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
class TestHarness:
    def test_loglikelihoods(self, real: Running, checkpoint: Path) -> None:
        pairs = [("the", " fox"), ("one two", " three é"), ("x" * 60, "yz")]
        found = loglikelihoods(real.url, MODEL, checkpoint, pairs, max_length=256, batch_size=2)
        model = prune_llm.load(checkpoint)
        for (before, behind), (logprob, is_greedy) in zip(pairs, found, strict=True):
            have, more = _ids(checkpoint, before), _ids(checkpoint, behind)
            logprobs_TV = _logprobs(model, [*have, *more])[len(have) - 1 : -1]
            expected = sum(float(row[token]) for row, token in zip(logprobs_TV, more, strict=True))
            # float32, summed in another order
            assert logprob == pytest.approx(expected, abs=1e-3)
            assert is_greedy == (logprobs_TV.argmax(-1).tolist() == more)

    def test_generations(self, real: Running, checkpoint: Path) -> None:
        settings = {"until": ["\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12}
        (text,) = generations(real.url, MODEL, checkpoint, ["the fox"], settings, max_length=256)
        asked = real.complete(prompt="the fox", max_tokens=12, temperature=0)
        assert text == asked["choices"][0]["text"]
        settings = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12}
        (text,) = chat_generations(real.url, MODEL, ["the fox"], settings)
        asked = real.complete(prompt="<user>the fox<assistant>", max_tokens=12, temperature=0)
        assert text == asked["choices"][0]["text"]


# -- under load -----------------------------------------------------------------------------------


def _prompt(number: int) -> dict[str, Any]:
    """Prompts of many lengths, some beginning alike; answers of many lengths."""
    random_ = random.Random(number)
    words = [random_.choice(["fox", "dog", "brave", "Town", "é", "星"]) for _ in range(1 + number)]
    shared = "Theo was a boy from Maple Town. Everybody knew that he was brave. " * (number % 3)
    prompt = (shared + " ".join(words))[:170]
    return {"prompt": prompt, "max_tokens": 3 + number * 7 % 60, "temperature": 0}


def _streamed(server: Running, number: int) -> str:
    body = {"model": MODEL, **_prompt(number), "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        events = [line[6:] for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


@pytest.mark.parametrize("name", ["real", "demo"])
def test_answers_in_company_are_those_alone(name: str, request: pytest.FixtureRequest) -> None:
    """64 streams, and clients that leave in between; float32 with levels, bfloat16."""
    server = request.getfixturevalue(name)
    alone = [server.complete(**_prompt(n))["choices"][0]["text"] for n in range(64)]
    assert len(set(alone)) > 32
    stop = threading.Event()

    def leave() -> int:
        left, random_ = 0, random.Random(0)
        while left < 4 or not stop.is_set():  # a busy machine may end the streams before four left
            body = {"model": MODEL, **_prompt(random_.randrange(64)), "max_tokens": 60}
            with ask(server.url, **body, stream=True) as connection:
                connection.recv(random_.choice([1, 400, 2000]))
            left += 1
        return left

    with ThreadPoolExecutor(1) as leaver:
        left = leaver.submit(leave)
        try:
            found = in_parallel(64, lambda n: _streamed(server, n))
        finally:
            stop.set()
    assert found == alone
    assert left.result() >= 4
    until(lambda: _is_empty(server))


def _is_empty(server: Running) -> bool:
    status = server.engine.status()
    held = status.cache_used
    return (status.running, status.waiting, held, server.lifecycle.running) == (0, 0, 0, 0)


def test_clients_that_leave_take_nothing_along(real: Running) -> None:
    expected = real.complete(**_prompt(30))
    loop = real.engine._keeper.get_loop()

    def tasks() -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), loop).result(10)

    real.client.close()
    real.client = httpx.Client(base_url=real.url, timeout=60)
    until(lambda: _is_empty(real))
    tasks_before, files_before = tasks(), len(os.listdir("/proc/self/fd"))
    served_before = metric(real.url, "request_success_total")
    random_ = random.Random(1)
    for batch in range(15):
        connections = [
            ask(
                real.url,
                model=MODEL,
                prompt="x" * random_.randrange(1, 150),
                max_tokens=100,
                ignore_eos=True,
                n=random_.choice([1, 1, 3]),
                stream=number % 4 > 0,
            )
            for number in range(20)
        ]
        for number, connection in enumerate(connections):
            connection.settimeout(random_.choice([0.002, 0.02]))
            try:
                if (batch + number) % 2:
                    connection.recv(random_.choice([1, 300, 3000]))
            except TimeoutError:
                pass
            connection.close()
    until(lambda: _is_empty(real), 30)
    until(lambda: tasks() <= tasks_before)
    until(lambda: len(os.listdir("/proc/self/fd")) <= files_before)
    assert real.engine._answers == {}
    # most left before their end
    assert metric(real.url, "request_success_total") - served_before < 100
    assert real.complete(**_prompt(30))["choices"] == expected["choices"]


def test_a_request_over_its_time_frees_its_row(real: Running) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    request = EngineRequest("late", (1, 2, 3), params, seconds=0.02)

    async def take() -> int:
        taken = 0
        with pytest.raises(TimeLimit, match=r"took longer than 0\.02 seconds"):
            async for answer in real.engine.stream(request):
                taken += answer.tokens
        return taken

    loop = real.engine._keeper.get_loop()
    assert asyncio.run_coroutine_threadsafe(take(), loop).result(20) < 200
    until(lambda: _is_empty(real))
    assert real.engine._answers == {}


# -- templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
        "{{ range(10**9) | list }}",
        "{{ 1 / 0 }}",
        "{{ messages[10**6].content }}",
        "{{ messages | nothing }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ 'x' + 1 }}",
        "{% for",
        "",
    ],
)
def test_templates_that_attack_or_fail_are_refusals(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """Nothing but a ValueError, which clients get with status 400."""
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"chat template|is empty"):
        _encode(tmp_path, Encoder(), [{"role": "user", "content": "x"}])
    assert not (tmp_path / "ran").exists()


def _encode(directory: Path, encoder: Encoder, prompt: Any) -> tuple[int, ...]:
    async def encode() -> tuple[int, ...]:
        await encoder.load(str(directory), False)
        return await encoder.encode(prompt)

    return asyncio.run(encode())


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for a in range(99999) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}"
        "{{ f(9) }}",
    ],
)
def test_a_template_without_an_end_is_interrupted(
    checkpoint: Path, tmp_path: Path, loop: str
) -> None:
    for file in checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    encoder, chat = Encoder(limit_seconds=0.3), [{"role": "user", "content": "fine"}]
    expected = _encode(tmp_path, encoder, chat)
    thread = encoder._thread.submit(threading.get_ident).result()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"did not end within 0\.3 seconds"):
            _encode(tmp_path, encoder, [{"role": "user", "content": "loop"}])
        # the thread is as good as before
        assert _encode(tmp_path, encoder, chat) == expected
    assert encoder._thread.submit(threading.get_ident).result() == thread
    encoder.close()


def test_a_prompt_at_the_limit_is_encoded_or_refused_and_harms_no_other() -> None:
    """The interruption arrives at any step, also behind the last."""
    with ThreadPoolExecutor(1) as pool:
        for trial in range(300):
            late = 1e-4 * (trial % 20)

            def work(until: float = time.monotonic() + 1e-3 + late) -> str:
                while time.monotonic() < until:
                    pass
                return "done"

            try:
                found = pool.submit(interrupted_after, 1e-3, work).result(timeout=10)
            except Interrupted:
                found = "interrupted"
            assert found in ("done", "interrupted")
            assert pool.submit(lambda: "next").result(timeout=10) == "next"


def test_a_sequence_that_ends_in_an_error_fails_its_request() -> None:
    async def ask() -> None:
        answers: asyncio.Queue[Any] = asyncio.Queue()
        answers.put_nowait({"id": "1", "token": 5})
        answers.put_nowait({"id": "1", "token": None, "error": "logits are not numbers"})
        await _next(answers)

    with pytest.raises(Failed, match="logits are not numbers"):
        asyncio.run(ask())
