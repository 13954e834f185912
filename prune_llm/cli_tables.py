"""Tables that the commands print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from prune_llm.card_markdown import size as size
from prune_llm.reconstruction import BlockReconstruction
from prune_llm.report import KindResult, PruneReport

if TYPE_CHECKING:
    from prune_llm.convert import CheckpointInfo, KindInfo
    from prune_llm_eval.compare import ModelQuality

KIND_COLUMNS = ("linears", "n", "asked", "achieved", "error", "solving", "before", "after")


INFO_COLUMNS = ("linears", "n", "packed", "weights", "sparsity", "dense", "on disk")
QUALITY_COLUMNS = ("model", "token_ppl", "nats/token", "KL", "flipped", "zeros", "on disk")
LEVEL_COLUMNS = ("model", "token_ppl", "change", "KL", "flipped", "zeros", "skipped")


def new_table(title: str, columns: tuple[str, ...]) -> Table:
    """Left-aligned names, right-aligned numbers, narrow enough for 80 columns."""
    table = Table(
        title=title, title_justify="left", padding=(0, 1, 0, 0), box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column(columns[0], overflow="fold", min_width=16)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_prune_report(console: Console, report: PruneReport) -> None:
    """Per kind of linear and in total, then what happened and what to know about it."""
    table = new_table(f"{report.config['method']} {report.config['pattern']}", KIND_COLUMNS)
    for kind in report.kinds():
        table.add_row(*_kind_cells(kind))
    table.add_section()
    table.add_row(*_kind_cells(report.total()))
    console.print(table)
    console.print(
        f"{size(report.bytes_before)} -> {size(report.bytes_after)} on disk, "
        f"{report.seconds:.1f} s in all, "
        + ", ".join(f"peak {k} memory {size(v)}" for k, v in report.peak_memory.items())
    )
    if "lowest" in report.allocation:
        spread = report.allocation
        console.print(
            f"allocation {spread['name']}: linears lose {spread['lowest']:.1%} to "
            f"{spread['highest']:.1%}, {spread['pruned']} of {spread['weights']} weights in all; "
            f"found in {spread['seconds']:.1f} s",
            soft_wrap=True,
        )
    checked = report.verification
    console.print(
        f"[green]verified[/]: {checked['linears_checked']} linears read back (counts, pattern, "
        f"finite), {checked['tensors_identical']} other tensors byte-identical",
        soft_wrap=True,
    )
    if report.calibration is not None:
        console.print(
            "error: ||(W - W') X||² / ||W X||² on calibration tokens, mean of the linears",
            soft_wrap=True,
        )
    if report.reconstruction:
        _print_reconstruction(console, report.reconstruction)
    if report.config["format"] == "dense":
        console.print("zeros are stored as zeros (format dense), so the file keeps its size")
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    console.print(f"wrote [bold]{report.output}[/]", soft_wrap=True)


def _print_reconstruction(console: Console, blocks: list[BlockReconstruction]) -> None:
    last, better = blocks[-1], sum(block.after < block.before for block in blocks)
    console.print(
        f"reconstructed towards the dense {'block' if last.goal == 'block' else 'predictions'}: "
        f"{better} of {len(blocks)} blocks better on held-out samples, loss of the last one "
        f"{last.before:.4g} -> {last.after:.4g} ({last.trained_after:.4g} on samples it was "
        f"trained on), {sum(block.seconds for block in blocks):.0f} s; the errors above are from "
        "before it",
        soft_wrap=True,
    )


def print_search(console: Console, search: dict[str, Any]) -> None:
    """What a search for a target in quality found, and what it costs where nothing saw it."""
    increase, windows = search["ppl_increase"], search["windows"]
    console.print(
        f"within {100 * search['max_ppl_increase']:g}%: {search['sparsity']:.0%} pruned costs "
        f"{increase['search']:+.2%} perplexity on {windows['search']} search windows and "
        f"[bold]{increase['held_out']:+.2%}[/] on {windows['held_out']} held-out windows that "
        f"neither pruning nor the search saw; {len(search['tries'])} sparsities were tried",
        soft_wrap=True,
    )


def _kind_cells(kind: KindResult) -> list[str]:
    return [
        kind.kind,
        str(kind.count),
        f"{kind.requested:.2%}",
        f"{kind.achieved:.2%}",
        "-" if kind.error is None else f"{kind.error:.4f}",
        f"{kind.seconds:.2f} s",
        size(kind.bytes_before),
        size(kind.bytes_after),
    ]


def print_info(console: Console, found: CheckpointInfo) -> None:
    """Pattern and bytes per kind of linear, where it comes from, and what was verified."""
    version = f" (version {found.format_version})" if found.format_version is not None else ""
    title = f"{found.format} form{version}, pattern {found.pattern or 'none recorded'}"
    table = new_table(title, INFO_COLUMNS)
    for kind in found.kinds:
        table.add_row(*_info_cells(kind))
    total = found.total
    if total is not None:
        table.add_section()
        table.add_row(*_info_cells(total))
    console.print(table)
    share = found.bytes_stored / found.bytes_dense
    console.print(
        f"all tensors: {size(found.bytes_stored)}, {share:.1%} of {size(found.bytes_dense)} dense"
    )
    if found.levels:
        console.print(f"activation levels: {', '.join(found.levels)}")
    if found.provenance:
        settings = found.provenance.get("config", {})
        console.print(
            f"pruned from {found.provenance.get('model')} by {settings.get('method')}, source "
            f"sha256 {str(found.provenance.get('model_sha256'))[:16]}",
            soft_wrap=True,
        )
    if found.verified is not None:
        console.print(f"[green]verified[/]: {found.verified} tensors read and checked")


def _info_cells(kind: KindInfo) -> list[str]:
    return [
        kind.kind,
        str(kind.count),
        str(kind.packed),
        str(kind.weights),
        f"{kind.sparsity:.2%}",
        size(kind.bytes_dense),
        size(kind.bytes_stored),
    ]


def print_quality(console: Console, rows: list[ModelQuality]) -> None:
    first = rows[0].quality
    levels = any(row.skipped is not None for row in rows)
    table = new_table(
        f"{first.tokens} predicted tokens in {first.windows} windows of {first.seq_len}",
        LEVEL_COLUMNS if levels else QUALITY_COLUMNS,
    )
    for row in rows:
        table.add_row(*(_level_cells(row, rows[0]) if levels else _quality_cells(row)))
    console.print(table)
    console.print(
        ("" if levels else "nats/token: mean ± standard error; ")
        + "KL: from the first model, nats per token; flipped: "
        "tokens whose likeliest continuation changed; zeros: in all linears of the blocks"
        + (
            "; change: of the perplexity, from the first model; skipped: realised activation "
            "sparsity, weighted by the weights it spares"
            if levels
            else ""
        ),
        soft_wrap=True,
    )


def _level_cells(row: ModelQuality, first: ModelQuality) -> list[str]:
    cells = _quality_cells(row)
    change = row.quality.token_ppl / first.quality.token_ppl - 1
    skipped = "-" if row.skipped is None else f"{row.skipped:.2%}"
    return [*cells[:2], f"{change:+.2%}", *cells[3:6], skipped]


def _quality_cells(row: ModelQuality) -> list[str]:
    quality = row.quality
    return [
        short(row.name),
        f"{quality.token_ppl:.4f}",
        f"{quality.nll:.3f}±{quality.nll_stderr:.3f}",
        "-" if quality.kl is None else f"{quality.kl:.4f}",
        "-" if quality.flips is None else f"{quality.flips:.2%}",
        f"{row.zeros:.2%}",
        size(row.nbytes),
    ]


def short(path: str) -> str:
    """The end of a long path: a table has no room for more."""
    return path if len(path) <= 24 else f"…/{Path(path).name}"
