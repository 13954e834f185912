"""`prune-llm frontier`: its options, its table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from prune_llm.cli_prune import (
    ACTIVATION_OPTIONS,
    LEVEL_OPTIONS,
    PRUNE_OPTIONS,
    activation_names,
    add_options,
    parse_target,
    quality_chosen,
)
from prune_llm.cli_sparsify import parse_shares
from prune_llm.cli_tables import new_table, size
from prune_llm.config import PruneConfig

if TYPE_CHECKING:
    from prune_llm_eval.frontier import Combination, FrontierReport

COLUMNS = ("", "weights", "inputs", "search", "held-out", "tokens/s", "faster", "on disk")
TIMING = ("context", "tokens", "rounds", "threads")


@click.command("frontier")
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write; new or empty.")
@click.option("--max-ppl-increase", required=True, help="For both together, such as 5%.")
@click.option(
    "--sparsities",
    default="0,0.3,0.4,0.5,0.6",
    show_default=True,
    help="Of the weights; the dense model is always among them.",
)
@add_options((*PRUNE_OPTIONS, *ACTIVATION_OPTIONS))
@click.option("--context", type=int, default=16, show_default=True, help="Prompt that is timed.")
@click.option("--tokens", type=int, default=64, show_default=True, help="Tokens decoded behind it.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Rounds; medians count.")
@click.option("--threads", type=int, help="Threads; torch's choice if not given.")
def frontier_command(
    model: str, output: str, max_ppl_increase: str, sparsities: str, **options: Any
) -> None:
    """Combine pruned weights and skipped activations; write the fastest within a target."""
    from prune_llm.cli import console, errors, eval_bar
    from prune_llm_eval.frontier import FrontierConfig, frontier

    chosen = {name: options.pop(f"activation_{name}") for name in LEVEL_OPTIONS}
    timing = {name: options.pop(name) for name in TIMING}
    with activation_names(*LEVEL_OPTIONS):
        config = FrontierConfig(
            parse_target(max_ppl_increase),
            parse_shares("sparsities", (sparsities,)),
            PruneConfig(**quality_chosen(options)),
            **{name: value for name, value in chosen.items() if value is not None},
            **timing,
        )
    with eval_bar() as show:
        report = frontier(model, config, output, show, lambda row: print_found(errors, row))
    print_frontier(console, report)


def print_found(console: Console, row: Combination) -> None:
    """A line for each combination as soon as its quality is known."""
    over = "" if row.feasible else ": too much"
    console.print(
        f"{_percent(row.sparsity)} of the weights, {row.activation_sparsity:.1%} of the inputs: "
        f"{row.ppl_increase['search']:+.2%} perplexity{over}"
    )


def print_frontier(console: Console, report: FrontierReport) -> None:
    """Every combination, and what the fastest is worth."""
    target = report.config["max_ppl_increase"]
    table = new_table(f"combinations for {100 * target:g}% more perplexity", COLUMNS)
    for row in report.rows:
        table.add_row("fastest" if row is report.best else "", *_cells(row, report))
    console.print(table)
    console.print(
        "weights: pruned; inputs: skipped, weighted by the weights they spare; search, held-out: "
        "perplexity over the dense model on windows of the search and on windows that nothing saw; "
        f"faster: than the dense row, by {report.decoder}, medians of "
        f"{report.config['rounds']} rounds; too much: above the target, not timed",
        soft_wrap=True,
    )
    if report.untried:
        left = ", ".join(_percent(sparsity) for sparsity in report.untried)
        console.print(f"not tried, since less already costs too much: {left}", soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)
    console.print(f"wrote [bold]{report.output}[/] in {report.seconds:.1f} s", soft_wrap=True)


def _verdict(report: FrontierReport) -> str:
    best, dense = report.best, report.dense
    if best is dense:
        return (
            "[yellow]the dense model is the fastest[/] within the target here: it was written, in "
            "the sparse form with nothing pruned"
        )
    ratio = best.tokens_per_second / dense.tokens_per_second
    level = "" if best.level == "dense" else f", at level [bold]{best.level}[/]"
    text = f"fastest: {ratio:.2f} times the dense model's {dense.tokens_per_second:.1f} tokens/s"
    if report.overlaps:
        text += "; some of its rounds were no faster than the dense model's: take it for noise"
    return text + level


def _cells(row: Combination, report: FrontierReport) -> list[str]:
    timed = ["too much", "-"]
    if row.feasible:
        faster = row.tokens_per_second / report.dense.tokens_per_second
        timed = [f"{row.tokens_per_second:.1f}", f"{faster:.2f}x"]
    return [
        _percent(row.sparsity),
        f"{row.activation_sparsity:.1%}",
        f"{row.ppl_increase['search']:+.2%}",
        f"{row.ppl_increase['held_out']:+.2%}",
        *timed,
        size(row.nbytes),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
