"""The `generate` command: streams the answer, then says how fast it came."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from prune_llm.generation import Generation, Prompt, stream


def run_generate(
    model: str, prompt: Prompt, settings: dict[str, Any], threads: int | None, as_json: bool
) -> None:
    """Text to standard output as it comes, figures to standard error; or one JSON document."""
    _quiet(threads)
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


def _quiet(threads: int | None) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def _speed(generation: Generation) -> float:
    return round(generation.tokens_per_second, 2)


def _figures(generation: Generation) -> str:
    reason = generation.finish_reason
    if reason == "length":
        reason += f": no more than {generation.max_tokens} were asked for or fit the context"
    return (
        f"{generation.prompt_tokens} prompt tokens in {generation.prefill_seconds:.2f} s, "
        f"{len(generation.token_ids)} tokens at {_speed(generation)} tokens/s "
        f"({reason}; {generation.decoder})"
    )
