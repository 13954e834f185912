"""lm-eval's own clients of an OpenAI server, for any server and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def loglikelihoods(
    url: str,
    model: str,
    tokenizer: Path,
    pairs: list[tuple[str, str]],
    *,
    max_length: int,
    batch_size: int = 1,
    key: str = "",
) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of each (context, continuation), by `local-completions`."""
    client = _client("local-completions", f"{url}/v1/completions", model, key,
                     tokenizer=str(tokenizer), tokenizer_backend="huggingface",
                     max_length=max_length, batch_size=batch_size)  # fmt: skip
    found: list[tuple[float, bool]] = client.loglikelihood(
        [_instance("loglikelihood", pair) for pair in pairs], disable_tqdm=True
    )
    return found


def generations(
    url: str,
    model: str,
    tokenizer: Path,
    prompts: list[str],
    settings: dict[str, Any],
    *,
    max_length: int,
    key: str = "",
) -> list[str]:
    """Continuations of prompts, by `local-completions`; ``settings`` as in a task's file."""
    client = _client("local-completions", f"{url}/v1/completions", model, key,
                     tokenizer=str(tokenizer), tokenizer_backend="huggingface",
                     max_length=max_length)  # fmt: skip
    return _generated(client, prompts, settings)


def chat_generations(
    url: str, model: str, prompts: list[str], settings: dict[str, Any], *, key: str = ""
) -> list[str]:
    """Answers to one user's message each, by `local-chat-completions`."""
    client = _client("local-chat-completions", f"{url}/v1/chat/completions", model, key)
    chats = [
        client.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts
    ]
    return _generated(client, chats, settings)


def _client(name: str, url: str, model: str, key: str, **settings: Any) -> Any:
    from lm_eval.api.registry import get_model

    header = {"Authorization": f"Bearer {key}"} if key else {}
    kind: Any = get_model(name)
    return kind(base_url=url, model=model, header=header, max_retries=1, **settings)


def _generated(client: Any, prompts: list[Any], settings: dict[str, Any]) -> list[str]:
    instances = [_instance("generate_until", (prompt, settings)) for prompt in prompts]
    found: list[str] = client.generate_until(instances, disable_tqdm=True)
    return found


def _instance(kind: Any, arguments: tuple[Any, ...]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
