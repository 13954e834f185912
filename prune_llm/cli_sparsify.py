"""`prune-llm sparsify`: its options, its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress as Bar

from prune_llm.activation.allocation import ALLOCATIONS
from prune_llm.activation.levels import CRITERIA
from prune_llm.activation.sites import GRANULARITIES
from prune_llm.activation.sparsify import Progress, SparsifyConfig, SparsifyReport, sparsify
from prune_llm.cli_tables import new_table

DEFAULTS = {entry.name: entry.default for entry in fields(SparsifyConfig)}
COLUMNS = ("level", "skipped", "ppl", "change", "KL", "fewest", "most")


def _option(name: str, **settings: Any) -> Callable[[Any], Any]:
    """A click option that stands for the SparsifyConfig field of the same name."""
    flag = "--" + name.replace("_", "-")
    return click.option(
        flag, name, default=DEFAULTS[name], show_default=DEFAULTS[name] is not None, **settings
    )


@click.command("sparsify")
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write; new or empty.")
@click.option(
    "--activation-sparsity",
    multiple=True,
    help="Share of input weights to skip, such as 0.4 or 25%,40%; a level each.  "
    "[default: 25%,40%,50%]",
)
@click.option(
    "--max-ppl-increase",
    multiple=True,
    help="Level with the largest sparsity that costs no more perplexity, such as 1%.",
)
@_option("criterion", help=f"What makes an input small: {', '.join(CRITERIA)}.")
@_option("allocation", help=f"How sites share the sparsity: {', '.join(ALLOCATIONS)}.")
@_option("granularity", help=f"What has a threshold of its own: {', '.join(GRANULARITIES)}.")
@_option("calibration", help="Text, JSONL, dataset NAME[:CONFIG[:SPLIT]] or 'bundled' stories.")
@_option("separator", help="Line between the documents of a text file.")
@_option("samples", type=int, help="Windows, split for thresholds, search and figures.")
@_option("seq_len", type=int, help="Tokens a window; the model's context, at most 2048.")
@_option("seed", type=int, help="Seed of the sampling.")
@_option("held_out", help="Another text for the figures; must not repeat the calibration text.")
@click.option("--ignore", multiple=True, help="Keep inputs of matching linears dense.")
@_option("device", help="auto, cpu, cuda or cuda:N.")
@_option("dtype", help="Dtype of the runs: auto, float32, bfloat16, float16.")
def sparsify_command(
    model: str,
    output: str,
    activation_sparsity: tuple[str, ...],
    max_ppl_increase: tuple[str, ...],
    **options: Any,
) -> None:
    """Give MODEL, dense or pruned, levels at which small activations are skipped."""
    from prune_llm.cli import console

    config = SparsifyConfig(
        activation_sparsity=parse_shares("activation_sparsity", activation_sparsity),
        max_ppl_increase=parse_shares("max_ppl_increase", max_ppl_increase),
        **options,
    )
    with _bar() as show:
        report = sparsify(model, config, output, show)
    print_levels(console, report)
    console.print(f"wrote [bold]{report.output}[/] in {report.seconds:.1f} s", soft_wrap=True)
    first = report.levels[0]["name"]
    console.print(f"\nnext: [bold]prune-llm eval {output} --level {first}[/]", soft_wrap=True)


def parse_shares(name: str, texts: tuple[str, ...]) -> tuple[float, ...]:
    """ "0.4", "40%" or comma lists of them, as fractions."""
    found = []
    for text in (part.strip() for given in texts for part in given.split(",")):
        try:
            share = float(text.removesuffix("%"))
        except ValueError:
            raise ValueError(f"{name} {text!r}: not a number; write 0.4 or 40%") from None
        found.append(round(share / 100, 12) if text.endswith("%") else share)
    return tuple(found)


def print_levels(console: Console, report: SparsifyReport) -> None:
    """A row for each level, with the sites where least and most is skipped."""
    text = "other" if "other" in report.dense_ppl else "held_out"
    tokens = report.levels[0]["texts"][text]["tokens"]
    where = report.config["held_out"] or "held-out windows"
    table = new_table(
        f"on {tokens} tokens of {where} (dense ppl {report.dense_ppl[text]:.4f})", COLUMNS
    )
    for level in report.levels:
        table.add_row(*_cells(level, text))
    console.print(table)
    console.print(
        "skipped: inputs, weighted by the weights they spare; fewest, most: of a site; "
        "change: of the perplexity",
        soft_wrap=True,
    )
    if text == "other":
        for level in report.levels:
            own, other = level["texts"]["held_out"], level["texts"]["other"]
            console.print(
                f"level {level['name']}: skips {own['sparsity']:.2%} at "
                f"{own['ppl_increase']:+.2%} on text like the calibration's, "
                f"{other['sparsity']:.2%} at {other['ppl_increase']:+.2%} on {where}",
                soft_wrap=True,
            )


def _cells(level: dict[str, Any], text: str) -> list[str]:
    figures = level["texts"][text]
    shares = [site["sparsity"] for site in level["sites"]]
    return [
        level["name"],
        f"{figures['sparsity']:.2%}",
        f"{figures['ppl']:.4f}",
        f"{figures['ppl_increase']:+.2%}",
        f"{figures['kl']:.4f}",
        f"{min(shares):.1%}",
        f"{max(shares):.1%}",
    ]


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A bar with what is being done; on a pipe it is silent."""
    from prune_llm.cli import errors

    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda now: bar.update(
            task, total=now.total, completed=now.done, description=now.phase
        )
