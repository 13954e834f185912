"""report.html: one file that needs nothing else, made of the values of report.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prune_llm_eval.report.charts import Series, marker
from prune_llm_eval.report.drawing import tag, text
from prune_llm_eval.report.figure import Figure
from prune_llm_eval.report.figures import figures
from prune_llm_eval.report.notation import clean, number, percent
from prune_llm_eval.report.passages import Flip, flips, whole_tokens
from prune_llm_eval.report.points import display, name_of
from prune_llm_eval.report.style import STYLE
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

# nothing may be fetched, whatever a text or name in the report contains
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
SECTIONS: dict[str, tuple[str, ...]] = {
    "Quality": ("quality", "frontier"),
    "Speed and size": ("decode-batch", "decode-context", "prompt-context", "size"),
    "Sparsity": ("sparsity", "error", "inputs"),
}


def render_page(report: dict[str, Any]) -> str:
    """The whole page."""
    drawn = {figure.id: figure for figure in figures(report)}
    title = f"{clean(str(report['model']['name']))}: what it gained and what it cost"
    sections = [(name, body) for name, body in _sections(report, drawn) if body]
    links = [tag("a", text(name), href=f"#{_anchor(name)}") for name, _ in sections]
    main = tag(
        "main",
        _header(report, title),
        _verdict(report),
        tag("nav", *links, aria_label="Sections"),
        *(
            tag("section", tag("h2", text(name)), *body, id=_anchor(name))
            for name, body in sections
        ),
    )
    head = tag(
        "head",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<link rel="icon" href="data:,">',
        tag("title", text(title)),
        tag("style", STYLE),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _header(report: dict[str, Any], title: str) -> str:
    against, told = report["against"], report["provenance"]
    beside = "no dense model" if against is None else clean(str(against["name"]))
    device = clean(str(told["environment"].get("device", "")))
    about = f"beside {beside}, {told['date']}, {device}"
    return tag("header", tag("h1", text(title)), tag("p", text(about), class_="sub"))


def _verdict(report: dict[str, Any]) -> str:
    verdict = report["verdict"]
    cards = [
        tag(
            "li",
            tag("span", text(card["label"]), class_="label"),
            tag("strong", text(card["value"])),
            tag("span", text(card["detail"]), class_="detail"),
            class_=card["tone"],
        )
        for card in verdict["cards"]
    ]
    lists = [
        tag("div", tag("h3", text(title)), _list(verdict[key]))
        for title, key in (
            ("Gained", "gained"),
            ("Cost", "cost"),
            ("No gain", "no_gain"),
        )
        if verdict[key]
    ]
    warned = report["warnings"]
    warnings = [tag("h3", "Warnings"), _list(warned, "warnings")] if warned else []
    return "".join(
        [
            _target(report),
            tag("ul", *cards, class_="cards"),
            tag("div", *lists, class_="verdict"),
            *warnings,
        ]
    )


def target_sentence(report: dict[str, Any]) -> tuple[str, bool] | None:
    """Whether what was asked for is met, and by what."""
    found = report["verdict"]["target"]
    if found is None:
        return None
    asked = f"{percent(found['max_ppl_increase'])} more perplexity"
    within = [display(report, name) for name in found["within"]]
    beyond = [display(report, name) for name in found["beyond"]]
    parts = [f"Within the target of {asked}: {', '.join(within)}" if within else ""]
    start = "beyond it" if within else f"Beyond the target of {asked}"
    parts.append(f"{start}: {', '.join(beyond)}" if beyond else "")
    return "; ".join(filter(None, parts)) + ".", bool(within)


def _target(report: dict[str, Any]) -> str:
    found = target_sentence(report)
    if found is None:
        return ""
    sentence, met = found
    return tag("p", text(sentence), class_=f"target {'good' if met else 'bad'}")


def _list(sentences: Sequence[str], kind: str | None = None) -> str:
    return tag("ul", *(tag("li", text(clean(one))) for one in sentences), class_=kind)


def _sections(report: dict[str, Any], drawn: dict[str, Figure]) -> Iterator[tuple[str, list[str]]]:
    """Names and what they hold; an empty one is left out."""
    pictures = {name: _pictures(ids, drawn) for name, ids in SECTIONS.items()}
    if report["quality"] is not None:
        yield "Quality", [table(quality_table(report)), *pictures["Quality"]]
        yield "What it forgot", list(_forgotten(report))
    if report["tasks"] is not None:
        yield "Tasks", [table(task_table(report))]
    timed = [] if report["speed"] is None else [table(speed_table(report))]
    yield "Speed and size", [*pictures["Speed and size"], *timed, table(size_table(report))]
    yield "Sparsity", [*pictures["Sparsity"], table(kind_table(report))]
    if report["missing"]:
        sentences = [f"{one['what']}: {one['how']}" for one in report["missing"]]
        yield "Not in this report", [_list(sentences, "missing")]
    yield "How it was made", [table(provenance_table(report), "words")]


def table(found: Table, kind: str | None = None) -> str:
    head = tag("tr", *(tag("th", text(name), scope="col") for name in found.columns))
    rows = [tag("tr", *(tag("td", text(cell)) for cell in row)) for row in found.rows]
    whole = tag("table", tag("thead", head), tag("tbody", *rows), class_=kind)
    # reachable by keyboard where it scrolls
    scrolling = tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="table")
    return scrolling + (tag("p", text(found.note), class_="note") if found.note else "")


def _pictures(ids: Sequence[str], drawn: dict[str, Figure]) -> list[str]:
    found = [_figure(drawn[id]) for id in ids if id in drawn]
    return [tag("div", *found, class_="figures")] if found else []


def _figure(figure: Figure) -> str:
    caption = tag("figcaption", tag("strong", text(figure.title)), tag("span", text(figure.about)))
    values = tag("details", tag("summary", "Values"), table(figure.table))
    legend = _legend(figure.series) if figure.series else ""
    return tag(
        "figure",
        caption,
        legend,
        figure.svg,
        values,
        id=f"figure-{figure.id}",
        data_marks=figure.marks,
    )


def _legend(series: Sequence[Series]) -> str:
    entries = [
        tag(
            "li",
            tag(
                "svg",
                marker(one.slot, 9.0, 7.0),
                viewBox="0 0 18 14",
                aria_hidden="true",
                class_=f"s-{one.slot}",
            ),
            tag("span", text(one.name)),
        )
        for one in series
    ]
    return tag("ul", *entries, class_="legend")


# -- what it forgot -----------------------------------------------------------------------------


def _forgotten(report: dict[str, Any]) -> Iterator[str]:
    rows = [row for row in report["quality"]["rows"] if row["forgotten"] is not None]
    if rows:
        yield tag(
            "p",
            "Passages with the largest difference from the first model. ",
            tag("span", "Underlined", class_="flip"),
            ": another token is the likeliest now; the darker the ground of a token, the larger "
            "the difference of the predictions (KL). Pointing at a token tells both predictions.",
            class_="key",
        )
    for place, row in enumerate(rows):
        body = [*_passages(row), *_buckets(row)]
        name = display(report, name_of(row))
        if place == 0:
            yield tag("h3", text(name)) + "".join(body)
        else:
            yield tag("details", tag("summary", text(f"{name}: the same")), *body)


def _buckets(row: dict[str, Any]) -> Iterator[str]:
    found = row["forgotten"]
    share = found["kl_of_worst_percent"]
    yield tag(
        "p",
        text(
            f"Half of the tokens differ by under {number(found['kl_median'], 3)} nats; the worst "
            f"1 % of them hold {percent(share)} of all KL. {percent(found['clearly_worse'], 2)} of "
            f"the tokens lost over 1 nat, {percent(found['clearly_better'], 2)} gained as much."
        ),
    )
    parts = [tag("h3", text(title)) + table(own) for title, own in forgotten_tables(row)]
    yield tag("details", tag("summary", "By position, frequency and token"), *parts)


def _passages(row: dict[str, Any]) -> Iterator[str]:
    passages = row["forgotten"]["passages"]
    if not passages:
        yield tag("p", "No passage differs.", class_="note")
    for passage in passages:
        tokens = [
            _token(shown, tooltip, flipped, much)
            for shown, tooltip, flipped, much in whole_tokens(passage)
        ]
        about = (
            f"window {passage['window']}, from token {passage['start']}: KL "
            f"{number(passage['kl'], 3)} a token, {percent(passage['flips'], 0)} flipped"
        )
        before = tag("span", text(f"…{clean(passage['before'])}"), class_="before")
        yield tag(
            "div",
            tag("span", text(about), class_="note"),
            tag("p", before, *tokens),
            _flips(flips(passage)),
            class_="passage",
        )


def _token(shown: str, tooltip: str, flipped: bool, much: float) -> str:
    inside = tag("span", text(shown), class_="flip") if flipped else text(shown)
    style = f"--much:{much:.2f}" if much >= 0.02 else None
    return tag("span", inside, class_="token", title=tooltip, style=style)


def _flips(found: Sequence[Flip]) -> str:
    entries = [
        tag(
            "li",
            text(f"…{one.before} "),
            tag("b", "?"),
            text(" dense: "),
            tag("b", text(one.dense)),
            text(", now: "),
            tag("b", text(one.now)),
        )
        for one in found
    ]
    return tag("ul", *entries, class_="flips") if entries else ""
