"""`prune-llm report`: its options, and the line that says what came of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from prune_llm.cli_eval import is_given
from prune_llm.cli_prune import add_options, parse_target
from prune_llm.cli_tasks import need_lm_eval

if TYPE_CHECKING:
    from prune_llm_eval.report.gathering import ReportConfig
    from prune_llm_eval.tasks import TaskConfig

QUALITY_OPTIONS = (
    click.option("--text", default="bundled", show_default=True, help="Text, JSONL or dataset."),
    click.option("--separator", help="Line between the documents of a text file."),
    click.option(
        "--seq-len", type=int, help="Window in tokens; the model's context, at most 2048."
    ),
    click.option("--windows", type=int, help="Score only the first so many windows."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="To score on: auto, cpu, cuda or cuda:N.",
    ),
    click.option(
        "--dtype", default="auto", show_default=True, help="To score in: auto, float32 ..."
    ),
    click.option(
        "--level", "levels", multiple=True, help="Activation level; repeatable.  [default: all]"
    ),
    click.option(
        "--passages", type=int, default=5, show_default=True, help="Worst passages shown."
    ),
)
TASK_OPTIONS = (
    click.option("--tasks", help="lm-eval tasks: names, groups, 'mmlu_*', YAML."),
    click.option("--num-fewshot", type=int, help="Examples before a question.  [default: task's]"),
    click.option("--limit", type=int, help="Only the first so many documents of each task."),
    click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences at once."),
    click.option("--include-path", help="Directory with further task files."),
    click.option("--apply-chat-template", is_flag=True, help="Send prompts as a user's messages."),
)
SPEED_OPTIONS = (
    click.option(
        "--context",
        "contexts",
        type=int,
        multiple=True,
        help="Prompt length; repeatable.  [default: 16, 128, 512]",
    ),
    click.option(
        "--batch",
        "batches",
        type=int,
        multiple=True,
        help="Sequences at once; repeatable.  [default: 1, 4, 16]",
    ),
    click.option("--tokens", type=int, default=32, show_default=True, help="Decoded for each."),
    click.option("--rounds", type=int, default=5, show_default=True, help="Rounds; medians count."),
    click.option("--threads", type=int, help="Threads; torch's choice if not given."),
    click.option("--grid", is_flag=True, help="Time every context at every batch size."),
)
QUALITY_NAMES = ("text", "separator", "seq_len", "windows", "passages")
SPEED_NAMES = ("contexts", "batches", "tokens", "rounds", "threads", "grid")
TASK_NAMES = ("num_fewshot", "limit", "batch_size", "include_path", "apply_chat_template")


@click.command("report")
@click.argument("model", required=False)
@click.option("-o", "--output", required=True, help="Directory for report.html, .md and .json.")
@click.option("--against", help="The dense model to compare with.")
@click.option("--max-ppl-increase", help="What may be lost, such as 5%; the report says if it is.")
@add_options(QUALITY_OPTIONS)
@add_options(TASK_OPTIONS)
@add_options(SPEED_OPTIONS)
@click.option("--no-quality", is_flag=True, help="Leave out perplexity and what was forgotten.")
@click.option("--no-speed", is_flag=True, help="Leave out speed and memory.")
@click.option(
    "--beside",
    multiple=True,
    help="comparison.json, frontier.json, sweep.json or another report.json to draw beside it; "
    "repeatable.",
)
@click.option("--from", "source", help="Only render a report.json again; measures nothing.")
@click.pass_context
def report_command(
    ctx: click.Context, /, model: str | None, output: str, source: str | None, **options: Any
) -> None:
    """Is MODEL good enough, and what was gained? Quality, tasks, speed and size in one report.

    Writes report.html (one file, opens anywhere), report.md and report.json.
    """
    from prune_llm.cli import console, eval_bar
    from prune_llm_eval.report.files import read_report_file, write_report
    from prune_llm_eval.report.gathering import gather

    _check_output(output)
    if source is not None:
        if model is not None:
            raise click.UsageError("--from takes no MODEL: it measures nothing")
        report = read_report_file(Path(source))
    else:
        if model is None:
            raise click.UsageError("Missing argument 'MODEL'")
        _check_together(ctx, options)
        config = _config(model, options, command_line(ctx))
        with eval_bar() as show:
            report = gather(model, options["against"], config, show)
    write_report(report, Path(output))
    print_verdict(console, report)
    console.print(f"wrote [bold]{output}[/]: report.html, .md, .json", soft_wrap=True)


def _check_output(output: str) -> None:
    """Before the work, not behind it."""
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"output {output!r}: is a file; give a directory")


def _check_together(ctx: click.Context, options: dict[str, Any]) -> None:
    """What sets up a part that is left out must not be given."""
    for names, left_out, reason in (
        (QUALITY_NAMES, options["no_quality"], "does not go with --no-quality"),
        (SPEED_NAMES, options["no_speed"], "does not go with --no-speed"),
        (TASK_NAMES, options["tasks"] is None, "needs --tasks"),
    ):
        given = [p for p in ctx.command.params if p.name in names and is_given(ctx, p.name)]
        if left_out and given:
            raise click.UsageError(f"{max(given[0].opts, key=len)} {reason}")
    if options["max_ppl_increase"] is not None and options["against"] is None:
        raise click.UsageError("--max-ppl-increase needs a dense model, --against DENSE")


def _config(model: str, options: dict[str, Any], command: str) -> ReportConfig:
    from prune_llm.sparse_checkpoint import open_stored
    from prune_llm_eval.compare import EvalConfig
    from prune_llm_eval.report.gathering import ReportConfig, level_names
    from prune_llm_eval.throughput import ThroughputConfig

    known = level_names(open_stored(model))
    levels = options["levels"] or tuple(known)
    for level in levels:
        if level not in known:
            listed = ", ".join(known) or "none; prune-llm sparsify makes them"
            raise ValueError(f"level {level!r}: does not exist; {model} has {listed}")
    quality = (*QUALITY_NAMES, "device", "dtype")
    speed = {name: options[name] for name in SPEED_NAMES if options[name] != ()}
    target = options["max_ppl_increase"]
    return ReportConfig(
        quality=None
        if options["no_quality"]
        else EvalConfig(**{name: options[name] for name in quality}, levels=levels),
        tasks=_tasks(options, levels),
        speed=None if options["no_speed"] else ThroughputConfig(**speed),
        levels=levels,
        max_ppl_increase=None if target is None else parse_target(target),
        beside=options["beside"],
        command=command,
    )


def _tasks(options: dict[str, Any], levels: tuple[str, ...]) -> TaskConfig | None:
    if options["tasks"] is None:
        return None
    need_lm_eval()
    from prune_llm_eval.tasks import TaskConfig

    names = tuple(name.strip() for name in options["tasks"].split(",") if name.strip())
    settings = {name: options[name] for name in (*TASK_NAMES, "device", "dtype")}
    return TaskConfig(names, levels=levels, **settings)


def command_line(ctx: click.Context) -> str:
    """What to type to run it again: the arguments that were given."""
    words = ["prune-llm", str(ctx.info_name)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if not is_given(ctx, name):
            continue
        value = ctx.params[name]
        values = value if isinstance(value, tuple) else (value,)
        for one in values:
            if isinstance(parameter, click.Option):
                words.append(max(parameter.opts, key=len))
            words += [] if one is True else [str(one)]
    return shlex.join(words)


def print_verdict(console: Console, report: dict[str, Any]) -> None:
    """The headline figures, and what the report warns of."""
    from prune_llm_eval.report.page import target_sentence

    for card in report["verdict"]["cards"]:
        console.print(
            f"{card['label']}: [bold]{card['value']}[/] ({card['detail']})", soft_wrap=True
        )
    target = target_sentence(report)
    if target is not None:
        colour = "green" if target[1] else "red"
        console.print(f"[{colour}]{target[0]}[/]", soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
