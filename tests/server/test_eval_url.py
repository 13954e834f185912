"""`eval --url`: a running server gets lm-eval's tasks; its values are those of the directory."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine, continuation, encode
from serving import Running, running, save_served
from tiny_models import save_tokenizer

from prune_llm.calibration import load_tokenizer
from prune_llm_eval.remote import Server, connect
from prune_llm_server.embedded import EmbeddedEngine, EngineConfig
from prune_llm_server.settings import ServerSettings

Cli = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's of its own future
KEY, VARIABLE = "a-key-of-the-test-02", "PRUNE_LLM_TEST_KEY"
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1.0}}
"""
CHOICE = """
task: my_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
ROLLING = """
task: my_pages
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
ANSWER = """
task: my_answer
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, because rounding depends on it, and a cache of datasets of our own."""
    import datasets

    before, cache = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = cache
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Answers are what the fake engine says at any level: in half of the documents."""
    place = tmp_path_factory.mktemp("tasks")
    words, lines = corpus.read_text().split(), []
    for i in range(6):
        text = " ".join(words[7 * i : 7 * i + 2 + i])
        answer = continuation(encode(text), 8) if i % 2 else "never"
        choices = words[100 + 3 * i :][: 2 + i % 2]
        lines.append({"text": text, "choices": choices, "label": i % 2, "answer": answer})
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = DATA.format(data=place / "data.jsonl")
    for name, text in {"a": CHOICE, "b": ANSWER, "c": ROLLING}.items():
        (place / f"{name}.yaml").write_text(text + data)
    return place


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer begins every text with <s>, as Llama's do."""
    place = save_served(tmp_path_factory.mktemp("served"))
    saved = json.loads((place / "tokenizer.json").read_text())
    first, text = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    saved["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (place / "tokenizer.json").write_text(json.dumps(saved))
    return place


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Running]:
    """A tiny float32 model with the levels 30% and 60%."""
    engine = EmbeddedEngine(EngineConfig(str(checkpoint), "tiny", threads=1), lambda code: None)
    with running(engine, ServerSettings(port=0)) as found:
        yield found


def rows_of(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["task"], row["model"]): row for row in json.loads(file.read_text())["rows"]}


def test_values_are_those_of_the_directory(
    cli: Cli, real: Running, checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    """Scores of texts and answers alike; only rounding differs: float32, three blocks."""
    begun = load_tokenizer(checkpoint)
    assert begun.encode("a") == [0, *begun.encode("a", add_special_tokens=False)]
    result = cli(
        "eval", "--url", real.url, "--against", checkpoint, "--tasks",
        "my_choice,my_pages,my_answer", "--include-path", tasks, "--batch-size", 3,
        "--device", "cpu", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "rows.json")
    assert len(rows) == 6
    for task in ("my_choice", "my_pages", "my_answer"):
        local, served = rows[task, str(checkpoint)], rows[task, "tiny (served)"]
        assert served["value"] == pytest.approx(local["value"], rel=1e-5)
        assert abs(served["paired"]["difference"]) <= 1e-5
        assert served["documents"] == 6
    assert json.loads((tmp_path / "rows.json").read_text())["server"]["url"] == real.url


def test_levels_and_the_key_are_in_every_request(
    cli: Cli, start: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    engine = FakeEngine()
    server = start(engine, api_keys=(KEY,))
    result = cli(
        "eval", "--url", server.url + "/v1/", "--api-key-env", VARIABLE, "--tasks", "my_answer",
        "--include-path", tasks, "--level", "40%", "--level", "50%", "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert KEY not in result.output and KEY not in (tmp_path / "r.json").read_text()
    rows = rows_of(tmp_path / "r.json")
    names = ["tiny/fake (served)", "level 40%", "level 50%"]
    assert [model for _, model in rows] == names
    assert [rows["my_answer", name]["value"] for name in names] == [0.5] * 3
    assert [request.level for request in engine.requests] == ["dense"] * 6 + ["40%"] * 6 + [
        "50%"
    ] * 6
    assert "reads prompts at the dense level" in " ".join(result.stdout.split())


def test_chats_are_answered_by_the_servers_template(cli: Cli, start: Any, tasks: Path) -> None:
    engine = FakeEngine()
    server = start(engine)
    result = cli(
        "eval", "--url", server.url, "--tasks", "my_answer", "--include-path", tasks,
        "--apply-chat-template", "--limit", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    prompts = {bytes(token - 2 for token in request.ids) for request in engine.requests}
    assert len(prompts) == 2 and all(prompt.startswith(b"<user>") for prompt in prompts)


def one_line(result: Any, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(told) == 1 and told[0].startswith("error: "), told
    for message in messages:
        assert message in told[0], told


@pytest.fixture
def ask(cli: Cli, tasks: Path) -> Callable[..., Any]:
    def run(url: str, *arguments: object, names: str = "my_answer") -> Any:
        return cli("eval", "--url", url, "--tasks", names, "--include-path", tasks, *arguments)

    return run


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_a_server_that_is_down(ask: Any) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    one_line(ask(url), f"url '{url}': no server answers there", "start one with prune-llm serve")


def test_a_server_that_goes_away(
    ask: Any, start: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: Path
) -> None:
    from prune_llm_eval import remote

    server = start(FakeEngine())
    monkeypatch.setattr(remote, "RETRIES", 1)
    monkeypatch.setattr(
        remote.Served, "check_tokenizer", lambda self: server.lifecycle.stop_with(0)
    )
    monkeypatch.setattr(remote.Served, "open", late(remote.Served.open, server))
    one_line(ask(server.url), f"url '{server.url}': no server answers there (ConnectionError)")


def late(open_: Any, server: Running) -> Any:
    """Only once the server has ended."""

    def opened(self: Any, batch_size: int) -> Any:
        server.thread.join(20)
        return open_(self, batch_size)

    return opened


def test_an_engine_that_fails(
    ask: Any, start: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_llm_eval.remote.RETRIES", 1)
    server = start(FakeEngine(errors={0: RuntimeError("broken")}))
    one_line(ask(server.url), f"url '{server.url}': answers with status 500")


def test_what_is_no_such_server_or_model(ask: Any, cli: Cli, start: Any, server: Any) -> None:
    one_line(ask("127.0.0.1:8000"), "url '127.0.0.1:8000': must begin with http:// or https://")
    result = cli("eval", "gpt-9", "--url", server.url, "--tasks", "my_answer")
    one_line(result, f"model 'gpt-9': the server at {server.url} has tiny/fake; name one")
    one_line(ask(start(FakeEngine(), api_keys=(KEY,)).url), "refuses no key", "--api-key-env NAME")
    with other_service() as url:
        one_line(ask(url), f"url '{url}': what answers there is no server with OpenAI's API")


class other_service:
    """Something that answers, and not in JSON."""

    def __enter__(self) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>hello</html>")

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = Thread(target=self.http.serve_forever)
        self.thread.start()
        return f"http://127.0.0.1:{self.http.server_port}"

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def test_what_cannot_be_asked(
    ask: Any, server: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url
    one_line(ask(url, names="my_choice"), "task 'my_choice': asks for loglikelihoods, which need")
    one_line(
        ask(url, "--apply-chat-template", names="my_choice"),
        "task 'my_choice': asks for loglikelihoods, which a chat API does not give",
    )
    one_line(
        ask(url, "--tokenizer", tokenizer, "--level", "40%", names="my_choice"),
        "task 'my_choice': asks for loglikelihoods of texts, which a server reads at the dense",
    )
    one_line(ask(url, "--level", "45%"), f"level '45%': the server at {url} has dense, 40%, 50%")
    one_line(ask(url, "--tokenizer", "missing"), "model 'missing': no such directory")
    monkeypatch.delenv(VARIABLE, raising=False)
    one_line(ask(url, "--api-key-env", VARIABLE), f"api_key_env '{VARIABLE}': there is no such")
    monkeypatch.setenv(VARIABLE, "wrong")


def test_another_tokenizer_is_refused(
    ask: Any, server: Any, tokenizer: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    shifted = tmp_path / "shifted"
    save_tokenizer(shifted)
    saved = json.loads((shifted / "tokenizer.json").read_text())
    letters = list(saved["model"]["vocab"])
    saved["model"]["vocab"] = {x: i for i, x in enumerate(letters[:2] + letters[:1:-1])}
    (shifted / "tokenizer.json").write_text(json.dumps(saved))
    one_line(
        ask(server.url, "--tokenizer", shifted),
        f"tokenizer '{shifted}': is not that of 'tiny/fake'",
    )
    one_line(
        ask(server.url, "--tokenizer", shifted, "--against", tiny_llama),
        "have different tokenizers",
    )


def test_options_that_do_not_go_together(cli: Cli, server: Any) -> None:
    one_line(cli("eval"), "Missing argument 'MODEL'")
    one_line(cli("eval", "--url", server.url), "--url needs --tasks")
    one_line(cli("eval", "MODEL", "--tokenizer", "DIR"), "--tokenizer needs --url")
    one_line(
        cli("eval", "--url", server.url, "--tasks", "my_answer", "--update-card"),
        "--update-card does not go with --url",
    )


def test_a_key_meant_for_openai_stays_here(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-server")
    for chat in (False, True):
        header = connect(Server(server.url), chat).open(1).header
        assert header == {"Content-Type": "application/json"}


def test_what_the_server_tells_of_itself(server: Any) -> None:
    found = connect(Server(server.url), chat=False)
    assert (found.model, found.context, found.levels) == ("tiny/fake", 256, ("dense", "40%", "50%"))
    assert found.notes(()) == [] and found.default_level == "dense"
