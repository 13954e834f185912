"""`prune-llm eval`: its options, and which of them belong together."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from prune_llm.cli_card import check_card, record_quality, record_tasks
from prune_llm.cli_forgotten import print_forgotten
from prune_llm.cli_tables import print_quality
from prune_llm.cli_tasks import finite, run_tasks


@click.command("eval")
@click.argument("model", required=False)
@click.option("--against", help="The dense model to compare with.")
@click.option("--text", default="bundled", show_default=True, help="Text, JSONL or dataset.")
@click.option("--separator", help="Line between the documents of a text file.")
@click.option("--seq-len", type=int, help="Window in tokens; the model's context, at most 2048.")
@click.option("--windows", type=int, help="Score only the first so many windows.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, ...")
@click.option("--level", "levels", multiple=True, help="Activation level of MODEL; repeatable.")
@click.option(
    "--protocol",
    default="all-sparse",
    show_default=True,
    help="How levels are scored: all-sparse, or first-half-dense as in the papers.",
)
@click.option(
    "--passages",
    type=int,
    default=5,
    show_default=True,
    help="Worst passages to show of the last row.",
)
@click.option("--tasks", help="lm-eval tasks instead of perplexity: names, groups, 'mmlu_*', YAML.")
@click.option("--num-fewshot", type=int, help="Examples before each question.  [default: task's]")
@click.option("--limit", type=int, help="Only the first so many documents of each task.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences run at once.")
@click.option("--include-path", help="Directory with further task files.")
@click.option("--apply-chat-template", is_flag=True, help="Send prompts as a user's messages.")
@click.option("--url", help="A running server (OpenAI's API) instead; MODEL: the name it serves.")
@click.option("--api-key-env", help="Environment variable that holds the server's key.")
@click.option(
    "--tokenizer", help="Directory of the served model's tokenizer.  [default: --against]"
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write JSON.")
@click.option("--update-card", is_flag=True, help="Put the figures into MODEL's README.md too.")
@click.pass_context
def eval_command(
    ctx: click.Context,
    /,
    model: str | None,
    against: str | None,
    json_file: str | None,
    update_card: bool,
    **options: Any,
) -> None:
    """Token perplexity of MODEL on a text and its KL to the dense model, or lm-eval tasks."""
    from prune_llm.cli import _check_folder, console, errors, eval_bar
    from prune_llm_eval.compare import EvalConfig, evaluate

    _check_folder("json", json_file)
    file = None if json_file is None else Path(json_file)
    served = {name: options.pop(name) for name in SERVER_OPTIONS}
    chosen = _tasks_or_text(ctx, options)
    if served["url"] is not None:
        _check_served(options["tasks"], update_card)
        served["tokenizer"] = served["tokenizer"] or against
        run_tasks(console, errors, None, against, chosen, file, {**served, "model": model})
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'")
    if lone := next((name for name, value in served.items() if value is not None), None):
        raise click.UsageError(f"--{lone.replace('_', '-')} needs --url")
    card = check_card(model) if update_card else None
    if options["tasks"] is not None:
        report = run_tasks(console, errors, model, against, chosen, file)
        if card is not None:
            record_tasks(card, report, against, chosen)
        return
    with eval_bar() as show:
        rows = evaluate(model, against, EvalConfig(**chosen), show)
    print_quality(console, rows)
    if card is not None:
        record_quality(card, rows, against, options)
    if options["protocol"] != "all-sparse":
        console.print(f"protocol {options['protocol']}: only the second half of a window is scored")
    if len(rows) > 1:
        print_forgotten(console, rows[-1], rows[0])
    if file is not None:
        file.write_text(json.dumps(finite([asdict(row) for row in rows]), indent=1) + "\n")


def _check_served(tasks: str | None, update_card: bool) -> None:
    if tasks is None:
        raise click.UsageError("--url needs --tasks: a server tells no scores of whole texts")
    if update_card:
        raise click.UsageError("--update-card does not go with --url: whose card it is, is unknown")


SERVER_OPTIONS = ("url", "api_key_env", "tokenizer")
TASK_OPTIONS = ("num_fewshot", "limit", "batch_size", "include_path", "apply_chat_template")
TEXT_OPTIONS = ("text", "separator", "seq_len", "windows", "protocol", "passages")


def _tasks_or_text(ctx: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of the one that was asked for; the other's options must not be given."""
    tasks = options["tasks"]
    other = TASK_OPTIONS if tasks is None else TEXT_OPTIONS
    given = [name for name in other if is_given(ctx, name)]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise click.UsageError(f"{flag} {'needs' if tasks is None else 'does not go with'} --tasks")
    if is_given(ctx, "passages") and not (ctx.params["against"] or options["levels"]):
        raise click.UsageError("--passages needs --against or --level, something to compare")
    kept = {name: value for name, value in options.items() if name not in (*other, "tasks")}
    if tasks is not None:
        kept["tasks"] = tuple(name.strip() for name in tasks.split(",") if name.strip())
    return kept


def is_given(ctx: click.Context, option: str) -> bool:
    return ctx.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT
