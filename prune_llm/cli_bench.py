"""The `bench` command: its progress, its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress as Bar

from prune_llm.cli_tables import new_table, size

if TYPE_CHECKING:
    from prune_llm_eval.resident import Resident
    from prune_llm_eval.speed import SpeedReport

LINEAR_COLUMNS = ("linear", "O x I", "rows", "thr", "torch ms", "ours dense", "packed", "limit")
DECODE_COLUMNS = ("context", "thr", "transformers", "ours dense", "packed", "faster", "limit")


def run_bench(
    console: Console,
    errors: Console,
    model: str,
    against: str | None,
    settings: dict[str, Any],
    json_file: Path | None,
) -> None:
    """Measure, print the tables and one JSON line."""
    from prune_llm_eval.speed import SpeedConfig, measure

    config = SpeedConfig(**settings)
    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        report = measure(
            model,
            against,
            config,
            lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    print_speed(console, report)
    click.echo(report.json_line())
    if json_file is not None:
        json_file.write_text(report.json_line() + "\n")


def print_speed(console: Console, report: SpeedReport) -> None:
    """Linears, decoding, memory, and what the columns mean."""
    about = report.about
    told = ("device", "gpu", "cuda", "cpu", "isa", "torch", "dtype")
    console.print(", ".join(f"{key} {about[key]}" for key in told if key in about))
    if report.linears:
        table = new_table("one linear after the other", LINEAR_COLUMNS)
        for row in report.linears:
            table.add_row(
                row.kind,
                f"{row.out_features}x{row.in_features}",
                str(row.batch),
                _threads(row.threads),
                f"{row.torch_seconds * 1e3:.3f}",
                f"{row.torch_seconds / row.dense_seconds:.2f}x",
                f"{row.speed_up:.2f}x",
                "cached" if row.cached else f"{row.limit:.0%}",
            )
        console.print(table)
    table = new_table("decoding, tokens/s", DECODE_COLUMNS)
    for decode in report.decodes:
        table.add_row(
            str(decode.context),
            _threads(decode.threads),
            f"{decode.transformers:.1f}",
            f"{decode.own_dense:.1f}",
            f"{decode.packed:.1f}",
            f"{decode.speed_up:.2f}x",
            f"{decode.limit:.0%}",
        )
    console.print(table)
    if report.resident is not None:
        _print_memory(console, report.resident)
    console.print(
        "rows: of x; thr: threads; ours dense, packed: times as fast as torch's dense linear; "
        "faster: packed against transformers' generate on the dense model; limit: share of the "
        "speed at which memory delivers the bytes, measured in the same run; cached: the weights "
        "fit a cache, where packing gains nothing",
        soft_wrap=True,
    )


def _threads(count: int | None) -> str:
    return "-" if count is None else str(count)


def _print_memory(console: Console, resident: Resident) -> None:
    other = f"{'-' if resident.other < 0 else ''}{size(abs(resident.other))}"
    console.print(
        f"memory: loading and decoding took {size(resident.loaded)}: weights "
        f"{size(resident.weights)}, cache {size(resident.cache)}, other "
        f"{other} (code and buffers, less weights never read), beside "
        f"{size(resident.imported)} of interpreter and libraries",
        soft_wrap=True,
    )
