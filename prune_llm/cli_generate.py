"""The `generate` command: streams the answer, then says how fast it came."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from prune_llm.generation import Generation, Prompt, stream
from prune_llm.speculative import Draft


def run_generate(
    model: str, prompt: Prompt, settings: dict[str, Any], threads: int | None, as_json: bool
) -> None:
    """Text to standard output as it comes, figures to standard error; or one JSON document."""
    _quiet(threads)
    settings = _with_draft(settings)
    generation: Generation | None = None
    for piece in stream(model, prompt, **settings):
        generation = piece.generation
        if not as_json:
            click.echo(piece.text, nl=False)
    assert generation is not None
    if as_json:
        click.echo(json.dumps({**asdict(generation), "tokens_per_second": _speed(generation)}))
    else:
        click.echo()
        click.echo(_figures(generation), err=True)


def _with_draft(settings: dict[str, Any]) -> dict[str, Any]:
    """The options --draft-level and --draft-tokens as one `Draft`."""
    level, tokens = settings.pop("draft_level", None), settings.pop("draft_tokens", None)
    if level is None and tokens is not None:
        raise click.UsageError("--draft-tokens needs --draft-level")
    if level is not None:
        settings["draft"] = Draft(level) if tokens is None else Draft(level, tokens)
    return settings


def _quiet(threads: int | None) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def _speed(generation: Generation) -> float:
    return round(generation.tokens_per_second, 2)


def _figures(generation: Generation) -> str:
    reason = str(generation.finish_reason)
    if reason == "length":
        reason += f": no more than {generation.max_tokens} were asked for or fit the context"
    done = generation.statistics
    if done.active is not None:
        reason += f"; level {done.level}, {done.active:.0%} of the inputs active"
    if done.drafted:
        reason += f"; {done.accepted} of {done.drafted} drafted tokens accepted"
    return (
        f"{generation.prompt_tokens} prompt tokens in {generation.prefill_seconds:.2f} s, "
        f"{len(generation.token_ids)} tokens at {_speed(generation)} tokens/s "
        f"({reason}; {generation.decoder} on {generation.device})"
    )
