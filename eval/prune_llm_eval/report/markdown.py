"""report.md: the tables and sentences of a report, of the values of report.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from prune_llm_eval.report.notation import clean, number, percent
from prune_llm_eval.report.page import target_sentence
from prune_llm_eval.report.passages import flips, whole_tokens
from prune_llm_eval.report.points import display, name_of
from prune_llm_eval.report.tables import (
    Table,
    forgotten_tables,
    kind_table,
    provenance_table,
    quality_table,
    size_table,
    speed_table,
    task_table,
)

PASSAGES_SHOWN = 3


def render_markdown(report: dict[str, Any]) -> str:
    """The whole text."""
    return "\n\n".join(_parts(report)) + "\n"


def _parts(report: dict[str, Any]) -> Iterator[str]:
    told = report["provenance"]
    yield f"# {escaped(clean(str(report['model']['name'])))}: what it gained and what it cost"
    beside = report["against"]
    dense = "no dense model" if beside is None else clean(str(beside["name"]))
    device = clean(str(told["environment"].get("device", "")))
    yield escaped(f"Beside {dense}, {told['date']}, {device}")
    yield from _verdict(report)
    yield "Pictures, and more passages: report.html, which opens in any browser."
    if report["quality"] is not None:
        yield "## Quality"
        yield from _table(quality_table(report))
        yield from _forgotten(report)
    for title, key, make in (
        ("Tasks", "tasks", task_table),
        ("Speed", "speed", speed_table),
        ("Size", "size", size_table),
        ("Sparsity", "sparsity", kind_table),
    ):
        if report[key] is not None:
            yield f"## {title}"
            yield from _table(make(report))
    if report["missing"]:
        yield "## Not in this report"
        yield _list([f"{one['what']}: {one['how']}" for one in report["missing"]])
    yield "## How it was made"
    yield from _table(provenance_table(report))


def _verdict(report: dict[str, Any]) -> Iterator[str]:
    verdict = report["verdict"]
    target = target_sentence(report)
    if target is not None:
        yield f"**{escaped(target[0])}**"
    cards = verdict["cards"]
    rows = tuple((card["label"], card["value"], card["detail"]) for card in cards)
    yield from _table(Table(("", "", ""), rows))
    for title, key in (("Gained", "gained"), ("Cost", "cost"), ("No gain", "no_gain")):
        if verdict[key]:
            yield f"**{title}**"
            yield _list(verdict[key])
    if report["warnings"]:
        yield "**Warnings**"
        yield _list(report["warnings"])


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(clean(one))}" for one in sentences)


def _table(table: Table) -> Iterator[str]:
    if table.rows:
        lines = [_line(table.columns), _line(["---", *["---:"] * (len(table.columns) - 1)], False)]
        yield "\n".join([*lines, *map(_line, table.rows)])
    if table.note:
        yield escaped(table.note)


def _line(cells: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(escaped(cell) if escape else cell for cell in cells) + " |"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no emphasis, no link, no table cell."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text).replace("&", "&amp;")


def _forgotten(report: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in report["quality"]["rows"] if row["forgotten"] is not None]
    if rows:
        yield "## What it forgot"
    for row in rows:
        yield f"### {escaped(display(report, name_of(row)))}"
        for title, table in forgotten_tables(row):
            yield f"**{title}**"
            yield from _table(table)
        for passage in row["forgotten"]["passages"][:PASSAGES_SHOWN]:
            yield _passage(passage)


def _passage(passage: dict[str, Any]) -> str:
    """Flipped tokens are bold."""
    shown = [escaped(clean(passage["before"]))]
    for flipped, tokens in groupby(whole_tokens(passage), key=lambda token: token[2]):
        own = "".join(token[0] for token in tokens)
        word = own.strip()
        marked = escaped(own).replace(escaped(word), f"**{escaped(word)}**") if word else own
        shown.append(marked if flipped else escaped(own))
    about = (
        f"Window {passage['window']}, from token {passage['start']}: KL "
        f"{number(passage['kl'], 3)} a token, {percent(passage['flips'], 0)} flipped"
    )
    lines = [f"> …{''.join(shown)}", ">", f"> {about}"]
    lines += [
        f"> - …{escaped(one.before)} ? dense: {escaped(one.dense)}, now: {escaped(one.now)}"
        for one in flips(passage)
    ]
    return "\n".join(lines)
