"""`prune-llm compare`: its options, its table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from prune_llm.cli_prune import OTHER_OPTIONS, add_options, published
from prune_llm.cli_sparsify import parse_shares
from prune_llm.cli_tables import new_table, short, size
from prune_llm.config import PruneConfig
from prune_llm.masks import Pattern
from prune_llm.methods import METHODS

if TYPE_CHECKING:
    from prune_llm_eval.comparison_report import ComparisonReport, Row

COLUMNS = ("", "pruned", "token_ppl", "KL", "flipped", "on disk", "time", "memory")
DEFAULT_METHODS = "magnitude,wanda,sparsegpt,alps"
DEFAULT_PATTERNS = "0.3,0.4,0.5,0.6,0.7,2:4,4:8"
# different warnings that are printed
WARNINGS = 5


@click.command("compare")
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write; new, or one to go on in.")
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    help=f"Of {', '.join(METHODS)}.",
)
@click.option("--patterns", default=DEFAULT_PATTERNS, show_default=True, help="Sparsities and N:M.")
@click.option("--text", default="bundled", show_default=True, help="What variants are scored on.")
@click.option("--windows", type=int, help="Score only the first so many windows.")
@click.option(
    "--statistics",
    default="shared",
    show_default=True,
    help="shared: of the dense model, gathered once for all. own: each variant is pruned as prune "
    "does it, every block behind the pruned ones before it.",
)
@click.option(
    "--knee",
    default="5%",
    show_default=True,
    help="Increase in perplexity within which a sparsity is called essential.",
)
@add_options(OTHER_OPTIONS)
def compare_command(
    model: str, output: str, methods: str, patterns: str, knee: str, **options: Any
) -> None:
    """Prune MODEL by every method at every pattern; table and picture of quality and cost.

    Stopped, the same command goes on where it was.
    """
    from prune_llm.cli import console, errors, eval_bar
    from prune_llm_eval.comparison import ComparisonConfig, compare_methods

    own = {name: options.pop(name) for name in ("text", "windows", "statistics")}
    config = ComparisonConfig(
        methods=_listed(methods),
        patterns=tuple(map(_pattern, _listed(patterns))),
        prune=PruneConfig(**published(options)),
        knee=_share("knee", knee),
        **own,
    )
    with _told_to_go_on(errors, output), eval_bar() as show:
        report = compare_methods(model, config, output, show, lambda row: print_row(errors, row))
    print_comparison(console, report)


@contextmanager
def _told_to_go_on(console: Console, output: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM say that nothing is lost."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if Path(output).exists():
            console.print(f"stopped: the same command goes on in {output}")
        raise


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _pattern(text: str) -> str:
    """ "50%" as "0.5"; anything else as it is."""
    return str(Pattern(_share("patterns", text))) if text.endswith("%") else text


def _share(name: str, text: str) -> float:
    found = parse_shares(name, (text,))
    if len(found) != 1:
        raise ValueError(f"{name} {text!r}: give one share, such as 5%")
    return found[0]


def print_row(console: Console, row: Row) -> None:
    """A line for each variant as soon as it is known."""
    kl = "" if row.quality.kl is None else f", KL {row.quality.kl:.4f}"
    name = f"{row.method} {row.pattern}".strip()
    console.print(f"{name}: token_ppl {row.quality.token_ppl:.4f}{kl}")


def print_comparison(console: Console, report: ComparisonReport) -> None:
    """Every variant, essential sparsity by method, and what the run took."""
    scored, kind = report.dense.quality.tokens, report.config["statistics"]
    table = new_table(
        f"{scored} tokens of {short(report.config['text'])}, {kind} statistics", COLUMNS
    )
    method = report.dense.method
    for row in report.rows:
        if row.method != method:
            table.add_section()
            method = row.method
        table.add_row(*_cells(row))
    console.print(table)
    alone = kind == "own"
    console.print(
        "KL: from the dense model, nats per token; flipped: tokens whose likeliest continuation "
        f"changed; time: of {'the whole pruning' if alone else 'solving'}; memory: the process's "
        "peak meanwhile",
        soft_wrap=True,
    )
    if report.knees:
        allowed = 100 * report.config["knee"]
        found = ", ".join(f"{name} [bold]{knee.text}[/]" for name, knee in report.knees.items())
        console.print(
            f"essential sparsity, up to {allowed:g}% more perplexity: {found}", soft_wrap=True
        )
    _print_warnings(console, report)
    shared = f", {report.calibration_seconds:.1f} s of it calibration for all" if not alone else ""
    console.print(
        f"{report.seconds:.1f} s in all{shared}; peak process memory "
        f"{size(report.peak_memory['process'])}"
    )
    console.print(
        f"wrote [bold]{report.output}[/]: comparison.json, .csv, .svg, .png", soft_wrap=True
    )


def _print_warnings(console: Console, report: ComparisonReport) -> None:
    told = [*report.warnings, *(text for row in report.rows for text in row.warnings)]
    different = list(dict.fromkeys(told))
    for warning in different[:WARNINGS]:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    if len(different) > WARNINGS:
        console.print(f"and {len(different) - WARNINGS} more warnings, in comparison.json")


def _cells(row: Row) -> list[str]:
    quality = row.quality
    pruned = row.pattern != ""
    return [
        f"{row.method} {row.pattern}",
        f"{row.sparsity:.1%}",
        f"{quality.token_ppl:.4g}",
        "-" if quality.kl is None else f"{quality.kl:.4f}",
        "-" if quality.flips is None else f"{quality.flips:.1%}",
        size(row.nbytes),
        f"{row.seconds:.2f} s" if pruned else "-",
        size(row.peak_memory["process"]) if pruned else "-",
    ]
