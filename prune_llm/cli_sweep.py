"""`prune-llm sweep`: its options, its table, what it recommends."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from prune_llm import PruneConfig
from prune_llm.activation.sparsify import SparsifyConfig
from prune_llm.activation.texts import LEAST_WINDOWS
from prune_llm.cli_compare import listed, pattern_of, told_to_go_on
from prune_llm.cli_prune import (
    ACTIVATION_OPTIONS,
    LEVEL_OPTIONS,
    OTHER_OPTIONS,
    activation_names,
    add_options,
    parse_target,
    published,
    quality_chosen,
)
from prune_llm.cli_sparsify import parse_shares
from prune_llm.cli_tables import new_table, short, size
from prune_llm.presets import PRESETS

if TYPE_CHECKING:
    from prune_llm_eval.sweep_report import SweepReport, SweepRow
    from prune_llm_eval.variants import Variant

COLUMNS = ("", "pruned", "inputs", "ppl", "change", "tokens/s", "faster", "on disk")
TIMING = ("context", "tokens", "rounds", "threads")
TASKS = ("tasks", "num_fewshot", "limit", "include_path")
RECONSTRUCTION = ("reconstruction_steps", "reconstruction_minutes", "reconstruction_rate")


@click.command("sweep")
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write; new, or one to go on in.")
@click.option("--methods", help="Methods as published, such as wanda,sparsegpt.")
@click.option(
    "--quality", help=f"Of {', '.join(PRESETS)}.  [default: fast,balanced without --methods]"
)
@click.option("--patterns", default="0.5,2:4", show_default=True, help="Sparsities and N:M.")
@click.option("--activation-levels", help="Skip these shares of inputs too, such as 25%,40%.")
@click.option("--text", default="bundled", show_default=True, help="What settings are scored on.")
@click.option("--windows", type=int, help="Score only the first so many windows.")
@click.option("--tasks", help="lm-eval tasks to run as well: names, groups, YAML files.")
@click.option("--num-fewshot", type=int, help="Examples before each question.  [default: task's]")
@click.option("--limit", type=int, help="Only the first so many documents of each task.")
@click.option("--include-path", help="Directory with further task files.")
@click.option(
    "--max-ppl-increase",
    default="5%",
    show_default=True,
    help="What the recommended setting may cost over the dense model.",
)
@click.option(
    "--keep",
    default="best",
    show_default=True,
    help="Checkpoints that stay: best (the recommended one), all, or none.",
)
@click.option("--context", type=int, default=16, show_default=True, help="Prompt that is timed.")
@click.option("--tokens", type=int, default=64, show_default=True, help="Tokens decoded behind it.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Rounds; medians count.")
@click.option("--threads", type=int, help="Threads; torch's choice if not given.")
@add_options((*OTHER_OPTIONS, *ACTIVATION_OPTIONS))
def sweep_command(
    model: str, output: str, max_ppl_increase: str, keep: str, **options: Any
) -> None:
    """Prune, score and time MODEL in many ways; recommend the fastest within a target.

    Stopped, the same command goes on where it was.
    """
    from prune_llm.cli import console, errors, eval_bar
    from prune_llm.cli_tasks import need_lm_eval
    from prune_llm_eval.sweep import sweep
    from prune_llm_eval.sweep_config import SweepConfig
    from prune_llm_eval.turns import Decoding

    tasks = _tasks({name: options.pop(name) for name in TASKS})
    if tasks is not None:
        need_lm_eval()
    timing = {name: options.pop(name) for name in TIMING}
    own = {name: options.pop(name) for name in ("text", "windows")}
    levels = _levels(options)
    config = SweepConfig(
        variants=_variants(options),
        levels=levels,
        tasks=tasks,
        decoding=Decoding(**timing),
        max_ppl_increase=parse_target(max_ppl_increase),
        keep=keep,
        **own,
    )
    with told_to_go_on(errors, output), eval_bar() as show:
        report = sweep(model, config, output, show, lambda row: print_row(errors, row))
    print_sweep(console, report)


def _tasks(given: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of a TaskConfig; None where no task is asked for."""
    if given["tasks"] is None:
        lone = next((name for name in TASKS[1:] if given[name] is not None), None)
        if lone is not None:
            raise click.UsageError(f"--{lone.replace('_', '-')} needs --tasks")
        return None
    return {**given, "tasks": listed(given["tasks"])}


def _levels(options: dict[str, Any]) -> SparsifyConfig | None:
    """Takes the options of the levels out; None where no level is asked for."""
    shares = options.pop("activation_levels")
    chosen = {name: options.pop(f"activation_{name}") for name in LEVEL_OPTIONS}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if shares is None:
        if chosen:
            raise click.UsageError(f"--activation-{next(iter(chosen))} needs --activation-levels")
        return None
    with activation_names(*LEVEL_OPTIONS):
        return SparsifyConfig(
            activation_sparsity=parse_shares("activation_levels", (shares,)),
            samples=max(LEAST_WINDOWS, options["samples"]),
            **chosen,
        )


def _variants(options: dict[str, Any]) -> dict[Variant, PruneConfig]:
    """Every method as published and every quality, at every pattern.

    What is given of a quality's parts, such as --target, counts for all; training is only for
    those that reconstruct.
    """
    from prune_llm_eval.variants import Variant

    methods, qualities = options.pop("methods"), options.pop("quality")
    patterns = tuple(map(pattern_of, listed(options.pop("patterns"))))
    if methods is None and qualities is None:
        qualities = "fast,balanced"
    training = {name: options.pop(name) for name in RECONSTRUCTION}
    training = {name: value for name, value in training.items() if value is not None}
    recipes = [
        *((name, None, name) for name in listed(methods or "")),
        *((name, name, None) for name in listed(qualities or "")),
    ]
    found: dict[Variant, PruneConfig] = {}
    for name, quality, method in recipes:
        for pattern in patterns:
            if Variant(name, pattern) in found:
                raise ValueError(f"variants {name} {pattern}: is given twice; give it once")
            own = {**options, "pattern": pattern, "method": method}
            own = published(own) if quality is None else quality_chosen({**own, "quality": quality})
            found[Variant(name, pattern)] = PruneConfig(**own)
    trained = {v for v, config in found.items() if config.reconstruction != "none"}
    if training and not trained:
        raise click.UsageError(
            f"--{next(iter(training)).replace('_', '-')} needs --reconstruction, or --quality best"
        )
    return {v: replace(c, **training) if v in trained else c for v, c in found.items()}


def print_row(console: Console, row: SweepRow) -> None:
    """A line for each setting as soon as its quality is known."""
    kl = "" if row.quality.kl is None else f", KL {row.quality.kl:.4f}"
    console.print(f"{row.name}: token_ppl {row.quality.token_ppl:.4f}{kl}")


def print_sweep(console: Console, report: SweepReport) -> None:
    """Every setting, and which to take."""
    scored = f"{report.dense.quality.tokens} tokens of {short(report.config['text'])}"
    table = new_table(scored, COLUMNS)
    method = report.dense.method
    for row in report.rows:
        if row.method != method:
            table.add_section()
            method = row.method
        table.add_row(*_cells(report, row))
    console.print(table)
    console.print(
        "@: at an activation level; inputs: skipped, weighted by the weights they spare; change: "
        f"of the perplexity; tokens/s: {report.decoder}, medians of "
        f"{report.config['decoding']['rounds']} rounds in turns; faster: than the dense model",
        soft_wrap=True,
    )
    _print_tasks(console, report)
    for line in verdict(report):
        console.print(line, soft_wrap=True)
    stays = ", ".join(report.kept) if report.kept else "no checkpoint"
    console.print(
        f"wrote [bold]{report.output}[/]: sweep.json, .csv, .svg, .png; kept: {stays}",
        soft_wrap=True,
    )


def _print_tasks(console: Console, report: SweepReport) -> None:
    names = list(report.dense.tasks)
    for name in names:
        table = new_table(name, ("", "value", "change"))
        base = report.dense.tasks[name][0]
        for row in report.rows:
            value, stderr = row.tasks[name]
            error = "" if stderr is None else f"±{stderr:.4f}"
            table.add_row(row.name, f"{value:.4f}{error}", f"{value - base:+.4f}")
        console.print(table)
    if names:
        console.print("± standard error; `prune-llm eval --against` pairs the documents")


def verdict(report: SweepReport) -> list[str]:
    """The fastest within the target, in plain words, and the smallest where that is another."""
    allowed = f"{100 * report.target:g}% more perplexity"
    fastest, smallest, dense = report.fastest, report.smallest, report.dense
    lines = []
    if not any(map(report.within, report.rows[1:])):
        closest = report.closest
        assert closest is not None, "a sweep has variants"
        return [
            f"[yellow]no setting stays within {allowed}[/]; the closest is {closest.name}, at "
            f"{report.increase(closest):+.2%}: allow more, or try lower sparsities or a better "
            "quality"
        ]
    if fastest is dense:
        lines.append(
            f"[yellow]the dense model is the fastest[/] within {allowed}, on this machine and at "
            "this batch and context"
        )
    else:
        ratio = fastest.tokens_per_second / dense.tokens_per_second
        noise = "; some of its rounds were no faster than the dense model's: take it for noise"
        lines.append(
            f"recommended: [bold]{fastest.name}[/], the fastest within {allowed}: "
            f"{report.increase(fastest):+.2%}, {ratio:.2f} times the dense model's "
            f"{dense.tokens_per_second:.1f} tokens/s, {size(fastest.nbytes)} for "
            f"{size(dense.nbytes)}{noise if report.overlaps(fastest) else ''}"
        )
    if smallest.nbytes < fastest.nbytes:
        lines.append(
            f"smallest within it: [bold]{smallest.name}[/], {size(smallest.nbytes)}, at "
            f"{report.increase(smallest):+.2%} and {smallest.tokens_per_second:.1f} tokens/s"
        )
    return lines


def _cells(report: SweepReport, row: SweepRow) -> list[str]:
    quality = row.quality
    faster = row.tokens_per_second / report.dense.tokens_per_second
    return [
        row.name,
        f"{row.sparsity:.1%}",
        "-" if row.skipped is None else f"{row.skipped:.1%}",
        f"{quality.token_ppl:.4g}",
        f"{report.increase(row):+.1%}",
        f"{row.tokens_per_second:.1f}",
        f"{faster:.2f}x",
        size(row.nbytes),
    ]
