"""Heatmaps of blocks and linears: where the zeros are, what they cost, what a level skips."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prune_llm_eval.report.charts import Cell, heatmap
from prune_llm_eval.report.figure import Figure
from prune_llm_eval.report.notation import UNKNOWN, clean, number, percent
from prune_llm_eval.report.tables import Table

# "model.layers.3.mlp.down_proj" -> 3, "mlp.down_proj"
BLOCK_LINEAR = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


def sparsity_map(report: dict[str, Any]) -> Figure | None:
    linears = report["sparsity"]["linears"]
    values = [(one["block"], one["kind"], one["sparsity"]) for one in linears]
    if not any(value for _, _, value in values):
        return None
    shares = [value for _, _, value in values]
    title = f"{percent(min(shares), 0)} to {percent(max(shares), 0)} of the weights are zero"
    if percent(min(shares), 0) == percent(max(shares), 0):
        title = f"{percent(shares[0], 0)} of the weights of every linear are zero"
    low, high = max(0.0, min(shares) - 0.05), min(1.0, max(shares) + 0.05)
    about = "Share of zero weights in each linear of each block, as stored."
    return _map("sparsity", title, about, values, (low, high), lambda v: percent(v, 0))


def error_map(report: dict[str, Any]) -> Figure | None:
    linears = report["sparsity"]["linears"]
    values = [(one["block"], one["kind"], one["error"]) for one in linears]
    known = [value for _, _, value in values if value is not None]
    if not known or max(known) == 0:
        return None
    block, kind, most = max(values, key=lambda entry: entry[2] or 0)
    title = f"Largest error: {clean(kind)} of block {block}, {number(most, 2)}"
    about = (
        "Relative squared error of each linear's output on the calibration tokens, "
        "||(W − W′)X||² / ||WX||²."
    )
    return _map("error", title, about, values, (0.0, max(known)), lambda v: number(v, 2))


def inputs_map(report: dict[str, Any]) -> Figure | None:
    """Of the last level that was scored."""
    rows = (report["quality"] or {"rows": []})["rows"]
    levels = [row for row in rows if row["site_sparsity"]]
    if not levels:
        return None
    row = levels[-1]
    values = list(_site_values(row["site_sparsity"], report["model"]["sites"]))
    if not values:
        return None
    shares = [value for _, _, value in values]
    title = f"Level {clean(row['level'])} skips {percent(row['skipped'], 0)} of the inputs"
    about = "Share of inputs that count as zero at each shared input of each block, on this text."
    high = min(1.0, max(shares) + 0.05)
    return _map("inputs", title, about, values, (0.0, high), lambda v: percent(v, 0))


def _site_values(
    shares: dict[str, float], sites: dict[str, list[str]]
) -> Iterator[tuple[int, str, float]]:
    """Block, the linears that share the input, as "q k v", and the share."""
    for name, share in shares.items():
        places = [BLOCK_LINEAR.search(linear) for linear in sites.get(name, [name])]
        kinds = [place[2] for place in places if place is not None]
        if places[0] is not None and kinds:
            short = short_names(kinds)
            yield int(places[0][1]), " ".join(short[kind] for kind in kinds), share


def _map(
    id: str,
    title: str,
    about: str,
    values: Sequence[tuple[int, str, float | None]],
    span: tuple[float, float],
    show: Callable[[float], str],
) -> Figure:
    kinds = list(dict.fromkeys(kind for _, kind, _ in values))
    blocks = sorted({block for block, _, _ in values})
    names = short_names(kinds)
    low, high = span
    what = "input of" if id == "inputs" else "linear"
    cells = [
        Cell(
            str(block),
            names[kind],
            None if value is None else (value - low) / ((high - low) or 1),
            UNKNOWN if value is None else show(value),
            f"block {block}, {clean(kind)}: {UNKNOWN if value is None else show(value)}",
        )
        for block, kind, value in values
    ]
    columns = [names[kind] for kind in kinds]
    svg = heatmap(
        [str(block) for block in blocks],
        columns,
        cells,
        ("block", what),
        (show(low), show(high)),
        title,
        about,
    )
    numbers = {(cell.row, cell.column): cell.number for cell in cells}
    rows = tuple(
        (str(block), *(numbers.get((str(block), column), UNKNOWN) for column in columns))
        for block in blocks
    )
    return Figure(id, title, about, svg, len(cells), Table(("block", *columns), rows))


def short_names(kinds: Sequence[str]) -> dict[str, str]:
    """ "self_attn.q_proj" as "q", where no other kind would be called so."""
    short = {kind: clean(kind.rpartition(".")[2].removesuffix("_proj")) for kind in kinds}
    taken = list(short.values())
    return {k: name if taken.count(name) == 1 else clean(k) for k, name in short.items()}
