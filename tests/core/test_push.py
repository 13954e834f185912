"""`push` sends what it shows, verified, with the hub's own client; a small hub answers here."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from prune_llm import PruneConfig, prune
from prune_llm.push import plan_push

Cli = Callable[..., Any]
TOKEN = "hf_not_a_real_one"


@dataclass
class Hub:
    """What the hub was asked, and how it answers: ``status`` by path."""

    url: str = ""
    status: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, bytes]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def body(self, part: str) -> Any:
        (found,) = [content for _, path, content in self.asked if part in path]
        return json.loads(found)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the one commit."""
        (lines,) = [content for _, path, content in self.asked if "/commit/" in path]
        found = {}
        for line in map(json.loads, lines.splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                found[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return found


def answer(hub: Hub, path: str, content: bytes) -> Any:
    """The few addresses of the hub that an upload of small files asks."""
    if path == "/api/repos/create":
        given = json.loads(content)
        name = f"{given['organization'] or 'me'}/{given['name']}"
        return {"url": f"{hub.url}/{name}", "name": name, "id": "1"}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if "/preupload/" in path:
        names = [entry["path"] for entry in json.loads(content)["files"]]
        modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        return {"files": [{"path": name, **modes} for name in names]}
    if "/commit/" in path:
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/me/out/commit/0"}
    return {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            found.asked.append((self.command, self.path, content))
            if self.command == "POST":
                found.tokens.add(self.headers.get("Authorization", ""))
            status = next((s for part, s in found.status.items() if part in self.path), 200)
            status = 404 if self.command == "GET" else status  # there is no such model yet
            reply = answer(found, self.path, content) if status == 200 else {"error": "no, never"}
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("push") / "out"
    prune(tiny_llama, PruneConfig(method="magnitude", device="cpu"), output)
    return output


def test_everything_arrives_in_one_commit(cli: Cli, hub: Hub, pruned: Path) -> None:
    result = cli("push", pruned, "lab/tiny-half", "--private")
    assert result.exit_code == 0, result.output
    assert f"{hub.url}/lab/tiny-half" in result.stdout and TOKEN not in result.output
    created = hub.body("/api/repos/create")
    assert (created["organization"], created["name"]) == ("lab", "tiny-half")
    assert created["visibility"] == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    on_disk = {path.name: path.read_bytes() for path in pruned.iterdir()}
    sent = hub.files
    assert sent.keys() == on_disk.keys() >= {"README.md", "model.sparse.safetensors"}
    assert all(sent[name] == on_disk[name] for name in sent if name != "README.md")
    card = sent["README.md"].decode()
    assert "from_pretrained('lab/tiny-half')" in card and "serve lab/tiny-half" in card
    assert "from_pretrained('out')" in (pruned / "README.md").read_text()  # stays as it is
    assert ModelCard(card).data.library_name == "prune-llm"


def test_a_branch_is_made(cli: Cli, hub: Hub, pruned: Path) -> None:
    assert cli("push", pruned, "out", "--revision", "half").exit_code == 0
    paths = [path for _, path, _ in hub.asked]
    assert "/api/models/me/out/branch/half" in paths and "/api/models/me/out/commit/half" in paths
    assert hub.body("/api/repos/create").get("visibility") is None


def test_a_card_that_was_edited_stays(hub: Hub, cli: Cli, pruned: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "out"))
    card = (directory / "README.md").read_text()
    (directory / "README.md").write_text(card.replace("## Limits", "Mine.\n\n## Limits"))
    assert "Mine." in plan_push(directory, "me/x").card
    assert "serve me/x" in plan_push(directory, "me/x").card
    (directory / "README.md").write_text("all mine\n")
    assert plan_push(directory, "me/x").card == "all mine\n"
    (directory / "README.md").unlink()
    assert "serve me/x" in plan_push(directory, "me/x").card


def test_a_dry_run_sends_nothing(cli: Cli, hub: Hub, pruned: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "out"))
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("secret")
    (directory / "pictures").mkdir()
    (directory / "pictures" / "frontier.svg").write_text("<svg/>")
    result = cli("push", directory, "lab/tiny-half", "--dry-run")
    assert result.exit_code == 0 and hub.asked == []
    for told in (
        "model.sparse.safetensors",
        "pictures/frontier.svg",
        "verified",
        "nothing was sent",
    ):
        assert told in result.stdout
    assert ".git" not in result.stdout
    plan = plan_push(directory, "lab/tiny-half")
    sizes = {name: (directory / name).stat().st_size for name in plan.files if name != "README.md"}
    assert plan.files == dict(sorted({**sizes, "README.md": len(plan.card.encode())}.items()))


@pytest.mark.parametrize(
    ("status", "part", "message"),
    [
        (401, "repos/create", "the token is not valid; run 'hf auth login' again (status 401"),
        (403, "repos/create", "may not write there; check the namespace and the token's rights"),
        (404, "preupload", "no such namespace or branch, or the token may not see it"),
        (500, "commit", "the hub refused (status 500"),
    ],
)
def test_what_the_hub_refuses(
    cli: Cli, hub: Hub, pruned: Path, status: int, part: str, message: str
) -> None:
    hub.status[part] = status
    one_line(cli("push", pruned, "lab/tiny-half"), message)


def one_line(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(told) == 1 and told[0].startswith("error: ") and message in told[0], told
    assert TOKEN not in result.output


def test_without_a_token_or_the_hub(
    cli: Cli, hub: Hub, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delenv("HF_TOKEN")
        patched.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        one_line(cli("push", pruned, "me/x"), "not logged in to the hub: run 'hf auth login'")
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        one_line(cli("push", pruned, "me/x"), "offline mode is on; unset HF_HUB_OFFLINE")
    assert hub.asked == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    one_line(cli("push", pruned, "me/x"), "the hub cannot be reached (ConnectError")


def test_what_is_no_finished_checkpoint(cli: Cli, hub: Hub, pruned: Path, tmp_path: Path) -> None:
    one_line(cli("push", tmp_path / "none", "me/x"), "no such directory; push sends a local one")
    (tmp_path / "empty").mkdir()
    one_line(cli("push", tmp_path / "empty", "me/x"), "has no config.json")
    half = Path(shutil.copytree(pruned, tmp_path / ".out.partial"))
    one_line(cli("push", half, "me/x"), "is not finished; run its command again")
    parts = Path(shutil.copytree(pruned, tmp_path / "parts"))
    (parts / "block-00001.part").write_bytes(b"half")
    one_line(cli("push", parts, "me/x"), "is not finished (block-00001.part)")
    damaged = Path(shutil.copytree(pruned, tmp_path / "damaged"))
    weights = damaged / "model.sparse.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    one_line(cli("push", damaged, "me/x"), "truncated")
    pickled = Path(shutil.copytree(pruned, tmp_path / "pickled"))
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    one_line(cli("push", pickled, "me/x"), "is no safetensors file and may run code")
    one_line(cli("push", pruned, "a/b/c"), "name 'a/b/c': cannot be a name on the hub")
    assert hub.asked == []
