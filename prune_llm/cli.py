"""The `prune-llm` command: parsing, printing, exit codes. One command, one short function."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from prune_llm import __version__
from prune_llm.cli_compare import compare_command
from prune_llm.cli_eval import eval_command
from prune_llm.cli_frontier import frontier_command
from prune_llm.cli_prune import prune_command
from prune_llm.cli_push import push_command
from prune_llm.cli_report import report_command
from prune_llm.cli_serve import serve_command
from prune_llm.cli_sparsify import sparsify_command
from prune_llm.cli_sweep import sweep_command
from prune_llm.cli_tables import print_info
from prune_llm.job import Progress
from prune_llm.ranks import refuse_launched

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


class OneLineErrors(click.Group):
    """Bad input ends in one line on stderr and exit code 2; `--traceback` shows where."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx is not None else "prune-llm"
            _fail(ctx, f"{error.format_message().rstrip('.')} (see {where} --help)")
        except (ValueError, OSError, ImportError) as error:  # ImportError: kernels not built
            if ctx.params.get("traceback"):
                raise
            _fail(ctx, str(error) or type(error).__name__)


def _terminate(_signal: int, _frame: object) -> None:
    """SIGTERM unwinds like Ctrl-C, so that what is half-written is removed."""
    sys.exit(128 + signal.SIGTERM)


def _fail(ctx: click.Context, message: str) -> None:
    errors.print(f"[bold red]error:[/] {escape(' '.join(message.split()))}")
    ctx.exit(2)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prune-llm")
@click.option("--traceback", is_flag=True, help="Show the whole traceback of an error.")
@click.pass_context
def main(ctx: click.Context, traceback: bool) -> None:
    """Make large language models sparse, and serve them faster."""
    if ctx.invoked_subcommand != "prune":  # which alone shares its work
        refuse_launched(str(ctx.invoked_subcommand))


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left; on a pipe it is silent."""
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    with bar:
        task = bar.add_task("reading the model", total=None)

        def show(progress: Progress) -> None:
            bar.update(
                task,
                total=progress.total,
                completed=progress.done,
                description=progress.text,
            )

        yield show


main.add_command(prune_command)
main.add_command(eval_command)
main.add_command(report_command)
main.add_command(sparsify_command)
main.add_command(frontier_command)
main.add_command(compare_command)
main.add_command(sweep_command)
main.add_command(serve_command)
main.add_command(push_command)


@main.command("lm-eval", context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval_command(arguments: tuple[str, ...]) -> None:
    """lm-eval's own command, with the model prune-llm: pretrained=DIR,level=40%."""
    from prune_llm.cli_tasks import need_lm_eval

    need_lm_eval()
    from prune_llm_eval.harness import run_lm_eval

    run_lm_eval(arguments)


def _check_folder(option: str, file: str | None) -> None:
    """Before the work, not behind it."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{option} {file!r}: its folder does not exist; make it first")


@contextmanager
def eval_bar() -> Iterator[Callable[[str, int, int], None]]:
    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, total: bar.update(
            task, total=total, completed=done, description=what
        )


@main.command("export")
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write; new or empty.")
@click.option(
    "--format",
    "format_",
    default="dense",
    show_default=True,
    help="dense (plain zeros, loads everywhere) or sparse (packed).",
)
def export_command(model: str, output: str, format_: str) -> None:
    """Write MODEL in the other form, bit for bit."""
    from prune_llm.convert import export

    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(f"writing the {format_} form", total=None)
        export(
            model,
            output,
            format_,
            lambda done, total: bar.update(task, total=total, completed=done),
        )
    console.print(f"wrote [bold]{output}[/]; every tensor read back identical", soft_wrap=True)


@main.command("info")
@click.argument("model")
@click.option("--verify", is_flag=True, help="Read and check every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def info_command(model: str, verify: bool, as_json: bool) -> None:
    """What the checkpoint MODEL holds: form, pattern, sparsity, bytes, origin."""
    from prune_llm.convert import info

    found = info(model, verify)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        print_info(console, found)


@main.command("generate")
@click.argument("model")
@click.option("--prompt", required=True, help="Text to continue; '-' reads standard input.")
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message.")
@click.option("--system", help="System message in front of it (with --chat).")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Most tokens to add.")
@click.option("--temperature", type=float, help="0: the most likely token.  [default: the model's]")
@click.option("--top-k", type=int, help="Keep the k most likely tokens; 0: all.")
@click.option("--top-p", type=float, help="Keep the most likely tokens of this probability.")
@click.option("--min-p", type=float, help="Keep tokens this likely relative to the likeliest.")
@click.option("--seed", type=int, help="Makes the draws repeatable.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("--level", help="Activation level, such as 40% (see info).  [default: dense]")
@click.option("--draft-level", help="Propose tokens at this level, verify them at --level.")
@click.option("--draft-tokens", type=int, help="Tokens proposed at a time.  [default: 3]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; torch's choice if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole answer as JSON.")
def generate_command(
    model: str,
    prompt: str,
    chat: bool,
    system: str | None,
    threads: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Continue a text with MODEL; the answer streams to standard output."""
    from prune_llm.cli_generate import run_generate

    if system is not None and not chat:
        raise click.UsageError("--system needs --chat")
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    run_generate(model, messages if chat else text, given, threads, as_json)


@main.command("bench")
@click.argument("model")
@click.option("--against", help="Dense model to compare with; MODEL with its zeros if not given.")
@click.option("--context", "contexts", type=int, multiple=True, help="Prompt length; repeatable.")
@click.option("--tokens", type=int, default=64, show_default=True, help="Tokens decoded behind it.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Rounds; medians count.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=int, multiple=True, help="Threads; repeatable.  [default: 1, all]")
@click.option("--batch", "batches", type=int, multiple=True, help="Rows of x; repeatable.")
@click.option("--no-linears", is_flag=True, help="Only decode; leave out the linears.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write JSON.")
def bench_command(
    model: str,
    against: str | None,
    no_linears: bool,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Time the packed checkpoint MODEL beside torch, and against the limit of memory."""
    from prune_llm.cli_bench import run_bench

    given = {name: value for name, value in settings.items() if value != ()}
    if no_linears:
        given["batches"] = ()
    _check_folder("json", json_file)
    file = None if json_file is None else Path(json_file)
    run_bench(console, errors, model, against, given, file)


@main.command("demo")
@click.option("-o", "--output", default="out/demo", show_default=True, help="Working directory.")
def demo_command(output: str) -> None:
    """Prune, verify and measure the bundled model in four ways; about a minute."""
    from prune_llm.cli_demo import run_demo

    run_demo(console, Path(output))


if __name__ == "__main__":
    main()
