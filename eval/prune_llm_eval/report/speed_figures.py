"""Pictures of speed over batch and context, and of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prune_llm_eval.report.charts import BOTTOM, LEFT, RIGHT, TOP, Bar, Mark, Series, bars
from prune_llm_eval.report.drawing import choice_axis, value_axis
from prune_llm_eval.report.figure import Figure, chart, slot_of
from prune_llm_eval.report.notation import UNKNOWN, number, per_second, seconds, signed, size, times
from prune_llm_eval.report.points import display, load_words, size_row, speed_row
from prune_llm_eval.report.tables import Table


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
    return chart(f"{what}-{over}", title, about, series, x, y, table=table)


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


def size_figure(report: dict[str, Any]) -> Figure:
    """Bytes on disk, in memory and, where they were counted, read for a token."""
    found = []
    for role in ("dense", "model"):
        row, timed = size_row(report, role), speed_row(report, role)
        memory, read = row["memory"], None if timed is None else timed["bytes_per_token"]
        values = {"on disk": row["disk"], "weights in memory": (memory or {}).get("weights")}
        if read is not None:
            values[f"read for a token,{load_words(report['speed']['loads'][0])[3:]}"] = read
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
