"""A running server with OpenAI's API as an lm-eval model: lm-eval's own clients, asked at a level.

Loglikelihoods need /v1/completions with token ids, `echo` and `logprobs`, which prune-llm's server
and vLLM's have, and the model's tokenizer here. Whether it is the server's is asked first. Texts
begin as lm-eval's transformers model begins them, with what the tokenizer puts in front; its
clients by themselves put nothing there, which gives other values. Where a text is longer than the
context its windows are two tokens shorter than there: the API always generates one.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from prune_llm.activation.levels import DENSE
from prune_llm.calibration import load_tokenizer

# of one request; a long prompt on a busy server takes its time
SECONDS = 300
RETRIES = 3
# lm-eval's own assumption, for servers that do not say what theirs is
CONTEXT = 2048
# read back by the server from token ids of the tokenizer here
PROBE = "Once upon a time, in 1984, she said: x_1 = {a[0]}; 12 + 30 is 42."
SHOWN = 60


@dataclass(frozen=True)
class Server:
    """Where it is and how it is asked.

    Attributes:
        url: http://HOST:PORT, with or without /v1.
        model: the name it serves; None: its only one.
        api_key_env: the environment variable that holds the key; None: no key.
        tokenizer: a directory (or hub name) with the model's tokenizer; None: not known here.
    """

    url: str
    model: str | None = None
    api_key_env: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r}: must begin with http:// or https://")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(
                f"api_key_env {self.api_key_env!r}: there is no such environment variable, or it "
                "is empty; set it to the key"
            )

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    @property
    def headers(self) -> dict[str, str]:
        """With the key; never empty, or lm-eval would send the one meant for OpenAI."""
        found = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            found["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        return found

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """GET, or POST of a body. Raises ValueError, in one line, for whatever goes wrong."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(
                self.refused(error.code, error.read().decode(errors="replace"))
            ) from None
        except OSError as error:
            raise ValueError(self.silent(getattr(error, "reason", error))) from None
        except ValueError:
            raise ValueError(
                f"url {self.url!r}: what answers there is no server with OpenAI's API ({path})"
            ) from None

    def silent(self, reason: object) -> str:
        return (
            f"url {self.url!r}: no server answers there ({reason}); start one with prune-llm "
            "serve, or give its address"
        )

    def refused(self, status: int, content: str) -> str:
        """What an answer with an error status means."""
        if status == 401:
            fix = "the key" if self.api_key_env else "no key, and it asks for one"
            return f"url {self.url!r}: refuses {fix} (status 401); give --api-key-env NAME"
        return f"url {self.url!r}: answers with status {status} ({_message(content)})"


def _message(content: str) -> str:
    """OpenAI's error message, or the beginning of whatever it is."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(content.split())[:SHOWN] or "no message"


@dataclass(frozen=True)
class Served:
    """One model of a server that answers.

    Attributes:
        context: tokens; None where the server does not say.
        levels: of activation sparsity; default_level: of requests that name none.
        tokenizer: directory here; None: not known.
    """

    server: Server
    model: str
    context: int | None
    levels: tuple[str, ...]
    default_level: str
    tokenizer: Path | None
    chat: bool

    def notes(self, levels: Sequence[str]) -> list[str]:
        """What a reader of the figures must know."""
        found = []
        if self.context is None and not self.chat:
            found.append(
                f"the server does not tell its context: texts were cut to {CONTEXT} tokens"
            )
        if self.default_level != DENSE:
            found.append(f"the server answers at its default level, {self.default_level}")
        if levels:
            found.append("a server reads prompts at the dense level and only its answers at others")
        return found

    def check_levels(self, levels: Sequence[str]) -> None:
        for level in levels:
            if level not in self.levels:
                has = f"has {', '.join(self.levels)}" if self.levels else "names no levels"
                raise ValueError(f"level {level!r}: the server at {self.server.url} {has}")

    def check_tasks(self, kinds: Mapping[str, str], levels: Sequence[str]) -> None:
        """Raises ValueError for what cannot be asked: by task, its lm-eval output type."""
        for task, kind in kinds.items():
            if kind == "generate_until":
                continue
            if self.chat:
                raise ValueError(
                    f"task {task!r}: asks for loglikelihoods, which a chat API does not give; "
                    "leave --apply-chat-template out, or take tasks that generate"
                )
            if self.tokenizer is None:
                raise ValueError(
                    f"task {task!r}: asks for loglikelihoods, which need the served model's "
                    "tokenizer here; give --tokenizer DIRECTORY"
                )
            if any(level != DENSE for level in levels):
                raise ValueError(
                    f"task {task!r}: asks for loglikelihoods of texts, which a server reads at the "
                    "dense level whatever is chosen; evaluate the directory itself, or take tasks "
                    "that generate"
                )

    def check_tokenizer(self) -> None:
        """Raises ValueError where the server reads our token ids as another text."""
        if self.chat or self.tokenizer is None:
            return
        tokenizer = load_tokenizer(self.tokenizer)
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        asked = {"model": self.model, "prompt": [ids], "max_tokens": 1, "echo": True}
        try:
            text = str(self.server.ask("/completions", asked)["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"url {self.server.url!r}: gives no completions that echo") from None
        if not text.startswith(tokenizer.decode(ids)):
            raise ValueError(
                f"tokenizer {str(self.tokenizer)!r}: is not that of {self.model!r}, which reads "
                f"its token ids as {text[:SHOWN]!r}; give the directory of the served model"
            )

    def open(self, batch_size: int) -> RemoteCompletions | RemoteChat:
        """As an lm-eval model."""
        settings: dict[str, Any] = {
            "model": self.model,
            "header": self.server.headers,
            "max_retries": RETRIES,
            "timeout": SECONDS,
            "max_length": self.context or CONTEXT,
        }
        if self.chat:
            lm: Any = RemoteChat(base_url=f"{self.server.base}/chat/completions", **settings)
        else:
            backend = None if self.tokenizer is None else "huggingface"
            tokenizer = None if self.tokenizer is None else str(self.tokenizer)
            lm = RemoteCompletions(
                base_url=f"{self.server.base}/completions",
                tokenizer=tokenizer,
                tokenizer_backend=backend,
                add_bos_token=self.tokenizer is not None and _puts_in_front(self.tokenizer),
                batch_size=batch_size,
                **settings,
            )
        lm.server = self.server
        return lm  # type: ignore[no-any-return]


def connect(server: Server, chat: bool) -> Served:
    """Ask a server what it serves.

    Raises:
        ValueError: it does not answer, or does not serve the model that is named.
    """
    from prune_llm.checkpoint import locate

    try:
        entries = {str(entry["id"]): entry for entry in server.ask("/models")["data"]}
    except (KeyError, TypeError):
        entries = {}
    if not entries:
        raise ValueError(f"url {server.url!r}: names no model it serves")
    name = server.model or next(iter(entries))
    if name not in entries or (server.model is None and len(entries) > 1):
        has = ", ".join(entries)
        raise ValueError(f"model {server.model!r}: the server at {server.url} has {has}; name one")
    context, levels = entries[name].get("max_model_len"), entries[name].get("levels")
    tokenizer = None if server.tokenizer is None else locate(server.tokenizer)
    return Served(
        server,
        name,
        context if isinstance(context, int) else None,
        _texts(levels),
        str(entries[name].get("default_level") or DENSE),
        tokenizer,
        chat,
    )


def _puts_in_front(directory: Path) -> bool:
    """Whether a tokenizer adds tokens of its own to a text, such as <s>."""
    tokenizer = load_tokenizer(directory)
    plain = tokenizer.encode(PROBE, add_special_tokens=False)
    return bool(tokenizer.encode(PROBE) != plain)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, Iterable) else ()


class _AtLevel:
    """What both clients add to lm-eval's: a level, and errors in one line."""

    server: Server
    level = DENSE
    gates = None  # what was skipped is not known here

    def use_level(self, name: str) -> None:
        self.level = name

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, **kwargs)  # type: ignore[misc]
        return payload if self.level == DENSE else {**payload, "level": self.level}

    def model_call(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().model_call(*args, **kwargs)  # type: ignore[misc]
        except OSError as error:  # all of the client's errors are
            response = getattr(error, "response", None)
            if response is None:
                raise ValueError(self.server.silent(type(error).__name__)) from error
            raise ValueError(self.server.refused(response.status_code, response.text)) from error


class RemoteCompletions(_AtLevel, LocalCompletionsAPI):  # type: ignore[misc]
    """lm-eval's local-completions."""


class RemoteChat(_AtLevel, LocalChatCompletion):  # type: ignore[misc]
    """lm-eval's local-chat-completions."""
