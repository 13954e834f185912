"""The pictures of a report: which there are, and what each shows. Values in, SVG out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prune_llm_eval.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    SLOTS,
    TOP,
    Bar,
    Cell,
    Mark,
    Series,
    bars,
    heatmap,
    plot,
)
from prune_llm_eval.report.drawing import Axis, choice_axis, linear_ticks, ratio_axis, value_axis
from prune_llm_eval.report.notation import (
    UNKNOWN,
    clean,
    number,
    per_second,
    percent,
    seconds,
    signed,
    size,
    times,
)
from prune_llm_eval.report.points import display, own_points, size_row, speed_row
from prune_llm_eval.report.tables import Table


@dataclass(frozen=True)
class Figure:
    """A picture with its title and what it shows; ``series`` for the legend; ``table`` its values.

    ``marks``: how many it must draw.
    """

    id: str
    title: str
    about: str
    svg: str
    marks: int
    table: Table
    series: tuple[Series, ...] = ()


def figures(report: dict[str, Any]) -> list[Figure]:
    """Those that the report has values for."""
    return [
        figure
        for make in (
            quality_figure,
            frontier_figure,
            decode_by_batch,
            decode_by_context,
            prompt_by_context,
            size_figure,
            sparsity_map,
            error_map,
            inputs_map,
        )
        if (figure := make(report)) is not None
    ]


def slot_of(name: str, names: Sequence[str]) -> str:
    """The colour of a series: dense, model and transformers have their own."""
    if name in ("dense", "model", "transformers"):
        return name
    others = [one for one in names if one not in ("dense", "model", "transformers")]
    return SLOTS[others.index(name) % len(SLOTS)]


# -- quality -----------------------------------------------------------------------------------


def all_points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of this model and of the files beside it."""
    return [*own_points(report), *(p for one in report["beside"] for p in one["points"])]


def quality_figure(report: dict[str, Any]) -> Figure | None:
    """Perplexity over the share of the multiplications that are left out, by zeros or inputs."""
    points = [p for p in all_points(report) if _finite(p["ppl_ratio"]) and _skipped(p) is not None]
    if len(points) < 2:
        return None
    x_ticks = tuple((n / 5, f"{20 * n} %") for n in range(6))
    x = Axis("multiplications left out", 0.0, 1.0, LEFT, RIGHT, x_ticks)
    y = ratio_axis("perplexity, beside dense", [p["ppl_ratio"] for p in points], BOTTOM, TOP)
    series = _series(report, points, lambda p: (_skipped(p), p["ppl_ratio"]), _describe)
    title = _quality_title(report, points)
    about = (
        "Perplexity beside the dense model's (logarithmic) over the share of the linears' "
        "multiplications that zero weights and skipped inputs leave out."
    )
    return _chart(
        "quality", title, about, series, x, y, baseline=1.0, table=_points_table(report, points)
    )


def _quality_title(report: dict[str, Any], points: list[dict[str, Any]]) -> str:
    own = [p for p in points if p["label"] == "model" and p["ppl_ratio"] != 1.0]
    own = own or [p for p in points if p["label"].startswith("level")]
    if not own:
        return "Perplexity against sparsity"
    change = signed(own[0]["ppl_ratio"] - 1)
    return f"{change} perplexity with {percent(_skipped(own[0]), 0)} left out"


def _skipped(point: dict[str, Any]) -> float | None:
    """Share of the multiplications that nothing needs; None where a part is not known."""
    weights, inputs = point["weight_sparsity"], point["input_sparsity"]
    return None if weights is None or inputs is None else 1 - (1 - weights) * (1 - inputs)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _describe(point: dict[str, Any]) -> str:
    parts = [clean(str(point["label"]))]
    if _finite(point["ppl_ratio"]):
        parts.append(f"{signed(point['ppl_ratio'] - 1, 2)} perplexity")
    parts.append(f"{percent(point['weight_sparsity'])} of the weights zero")
    parts.append(f"{percent(point['input_sparsity'])} of the inputs skipped")
    if point["speed_ratio"] is not None:
        parts.append(f"{times(point['speed_ratio'])} as fast as dense")
    return ", ".join(parts)


def frontier_figure(report: dict[str, Any]) -> Figure | None:
    """Perplexity over speed, both beside the dense model of the same run."""
    points = [
        p for p in all_points(report) if _finite(p["ppl_ratio"]) and p["speed_ratio"] is not None
    ]
    if len(points) < 2:
        return None
    speeds = [p["speed_ratio"] for p in points]
    ticks = linear_ticks(min(*speeds, 0.9), max(*speeds, 1.1))
    named = tuple((tick, f"{tick:g}×") for tick in ticks)
    x = Axis("decoding speed, times dense", ticks[0], ticks[-1], LEFT, RIGHT, named)
    y = ratio_axis("perplexity, beside dense", [p["ppl_ratio"] for p in points], BOTTOM, TOP)
    series = _series(report, points, lambda p: (p["speed_ratio"], p["ppl_ratio"]), _describe)
    series = tuple(Series(one.name, one.slot, one.marks, line=False) for one in series)
    load = "" if report["speed"] is None else _load_words(report["speed"]["loads"][0])
    best = max(points, key=lambda p: p["speed_ratio"])
    title = "Nothing is faster than the dense model here"
    if best["speed_ratio"] > 1:
        title = f"Fastest: {_named(report, best['label'])}, {times(best['speed_ratio'])} dense"
    about = (
        f"Perplexity (logarithmic) over the speed of decoding{load}; lower and further right is "
        "better."
    )
    table = _points_table(report, points)
    return _chart("frontier", title, about, series, x, y, baseline=1.0, table=table)


def _load_words(load: dict[str, Any]) -> str:
    return f" at batch {load['batch']}, context {load['context']}"


def _named(report: dict[str, Any], label: str) -> str:
    return display(report, label) if label in ("dense", "model") else clean(label)


def _series(
    report: dict[str, Any],
    points: list[dict[str, Any]],
    place: Callable[[dict[str, Any]], tuple[float | None, float]],
    describe: Callable[[dict[str, Any]], str],
) -> tuple[Series, ...]:
    names = list(dict.fromkeys(point["series"] for point in points))
    found = []
    for name in names:
        own = [(place(point), describe(point)) for point in points if point["series"] == name]
        marks = tuple(Mark(x, y, label) for (x, y), label in own if x is not None)
        line = "N:M" not in name
        found.append(Series(_named(report, name), slot_of(name, names), marks, line))
    return tuple(found)


def _points_table(report: dict[str, Any], points: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            _named(report, p["label"]),
            percent(p["weight_sparsity"]),
            percent(p["input_sparsity"]),
            signed(p["ppl_ratio"] - 1, 2),
            times(p["speed_ratio"]),
        )
        for p in points
    )
    columns = ("", "weights zero", "inputs skipped", "perplexity", "decoding, times dense")
    return Table(columns, rows, "perplexity: beside the dense model on the same text.")


def _chart(
    id: str,
    title: str,
    about: str,
    series: tuple[Series, ...],
    x: Axis,
    y: Axis,
    *,
    table: Table,
    baseline: float | None = None,
) -> Figure:
    drawn = plot(series, x, y, title, about, baseline)
    return Figure(id, title, about, drawn, sum(len(s.marks) for s in series), table, series)


# -- speed -------------------------------------------------------------------------------------


def decode_by_batch(report: dict[str, Any]) -> Figure | None:
    loads = _loads(report, "context")
    return _speed_figure(report, loads, "batch", "decode")


def decode_by_context(report: dict[str, Any]) -> Figure | None:
    return _speed_figure(report, _loads(report, "batch"), "context", "decode")


def prompt_by_context(report: dict[str, Any]) -> Figure | None:
    return _speed_figure(report, _loads(report, "batch"), "context", "prompt")


def _loads(report: dict[str, Any], fixed: str) -> list[dict[str, Any]]:
    """Those with the least context, or the least batch."""
    loads: list[dict[str, Any]] = (report["speed"] or {"loads": []})["loads"]
    least = min((load[fixed] for load in loads), default=0)
    return [load for load in loads if load[fixed] == least]


WORDS = {
    "decode": ("Decoding", "decoded tokens/s, all sequences"),
    "prompt": ("Reading prompts", "prompt tokens/s"),
}


def _speed_figure(
    report: dict[str, Any], loads: list[dict[str, Any]], over: str, what: str
) -> Figure | None:
    """A rate over batch or context, with the spread of the rounds."""
    if not loads:
        return None
    rate = f"{what}_tokens_per_second"
    names = [row["variant"] for row in loads[0]["rows"]]
    shown = [name for name in names if what == "decode" or not name.startswith("level")]
    series = tuple(
        Series(
            display(report, name),
            slot_of(name, names),
            tuple(_rate_mark(report, load, name, over, rate) for load in loads),
        )
        for name in shown
    )
    highest = [mark.high or mark.y for one in series for mark in one.marks]
    y = value_axis(WORDS[what][1], highest, BOTTOM, TOP, lambda tick: number(tick, 3))
    units = {"batch": "sequences at once", "context": "tokens in the prompt"}
    x = choice_axis(units[over], [load[over] for load in loads], LEFT, RIGHT)
    fixed = "context" if over == "batch" else "batch"
    about = (
        f"Tokens a second over {'batch size' if over == 'batch' else 'context'}, at {fixed} "
        f"{loads[0][fixed]}; the whiskers reach from the slowest to the fastest of "
        f"{report['speed']['config']['rounds']} rounds."
    )
    title = _speed_title(loads, over, what)
    table = _rate_table(report, loads, shown, over, what)
    return _chart(f"{what}-{over}", title, about, series, x, y, table=table)


def _rate_mark(
    report: dict[str, Any], load: dict[str, Any], name: str, over: str, rate: str
) -> Mark:
    row = next(row for row in load["rows"] if row["variant"] == name)
    found = row[rate]
    label = (
        f"{display(report, name)}, {over} {load[over]}: {per_second(found['median'])} tokens/s "
        f"({per_second(found['low'])} to {per_second(found['high'])})"
    )
    return Mark(load[over], found["median"], label, found["low"], found["high"])


def _speed_title(loads: list[dict[str, Any]], over: str, what: str) -> str:
    """How the model compares with dense at the least and the most."""
    gains = []
    for load in (loads[0], loads[-1]):
        row = next(row for row in load["rows"] if row["variant"] == "model")
        gains.append(f"{times(row[f'{what}_gain']['median'])} dense at {over} {load[over]}")
    return f"{WORDS[what][0]}: " + ", ".join(dict.fromkeys(gains))


def _rate_table(
    report: dict[str, Any],
    loads: list[dict[str, Any]],
    names: Sequence[str],
    over: str,
    what: str,
) -> Table:
    rows = []
    for load in loads:
        for row in load["rows"]:
            if row["variant"] in names:
                found, gain = row[f"{what}_tokens_per_second"], row[f"{what}_gain"]
                late = row["ttft" if what == "prompt" else "tpot"]["median"]
                spread = f"{per_second(found['low'])}–{per_second(found['high'])}"
                rows.append(
                    (
                        display(report, row["variant"]),
                        str(load[over]),
                        per_second(found["median"]),
                        spread,
                        seconds(late),
                        UNKNOWN if gain is None else times(gain["median"]),
                    )
                )
    columns = (
        "",
        over,
        "tokens/s",
        "least to most",
        "TTFT" if what == "prompt" else "TPOT",
        "gain",
    )
    return Table(columns, tuple(rows))


# -- size ----------------------------------------------------------------------------------------


def size_figure(report: dict[str, Any]) -> Figure:
    """Bytes on disk, in memory and, where they were counted, read for a token."""
    found = []
    for role in ("dense", "model"):
        row, timed = size_row(report, role), speed_row(report, role)
        memory, read = row["memory"], None if timed is None else timed["bytes_per_token"]
        values = {"on disk": row["disk"], "weights in memory": (memory or {}).get("weights")}
        if read is not None:
            values[f"read for a token,{_load_words(report['speed']['loads'][0])[3:]}"] = read
        name = display(report, role)
        found += [
            Bar(group, role, value, size(value), f"{name}, {group}: {size(value)}")
            for group, value in values.items()
            if value is not None
        ]
    groups = dict.fromkeys(bar.group for bar in found)
    found.sort(key=lambda bar: list(groups).index(bar.group))
    before, after = (size_row(report, role)["disk"] for role in ("dense", "model"))
    title = f"{signed(after / before - 1, 0)} on disk"
    about = "Bytes of both models; each group of bars has its own scale."
    series = tuple(Series(display(report, role), role, ()) for role in ("dense", "model"))
    rows = tuple((bar.group, bar.label.split(",")[0], bar.number) for bar in found)
    svg = bars(found, title, about)
    return Figure("size", title, about, svg, len(found), Table(("", "", "bytes"), rows), series)


# "model.layers.3.mlp.down_proj" -> 3, "mlp.down_proj"
BLOCK_LINEAR = re.compile(r"(?:^|\.)(\d+)\.(.+)$")

# -- heatmaps ----------------------------------------------------------------------------------


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
