"""Text, tables and pictures of a report made by hand: what is said, what is drawn, what is not."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_values import EVIL, LOADS, STEPS, VARIANTS, completed, report_values

from prune_llm_eval.report import notation
from prune_llm_eval.report.beside import read_beside
from prune_llm_eval.report.drawing import linear_ticks, ratio_axis, value_axis
from prune_llm_eval.report.figures import figures
from prune_llm_eval.report.files import read_report_file, write_report
from prune_llm_eval.report.markdown import render_markdown
from prune_llm_eval.report.page import render_page
from prune_llm_eval.report.speed_section import gain

Values = dict[str, Any]
SVG_TAGS = {"svg", "title", "desc", "g", "line", "text", "polyline", "path", "circle", "rect"}
PAGE_TAGS = {
    "html", "head", "meta", "link", "style", "body", "main", "header", "nav", "section", "div",
    "h1", "h2", "h3", "p", "span", "strong", "b", "a", "ul", "li", "figure", "figcaption",
    "details", "summary", "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip


@pytest.fixture
def values() -> Values:
    return report_values()


class Seen(HTMLParser):
    """Tags with their attributes, and all text outside <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += "" if self.tags and self.tags[-1][0] == "style" else data


def marks(svg: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if "mark" in e.get("class", "").split()]


def test_every_figure_draws_all_of_its_data(values: Values) -> None:
    drawn = {figure.id: len(marks(figure.svg)) for figure in figures(values)}
    timed = {"batch": 2, "context": 2}  # loads at the least context, and at the least batch
    assert drawn == {
        "quality": 3 + 3,  # dense, model and level; of those beside all but the broken one
        "frontier": 3,
        "decode-batch": len(VARIANTS) * timed["batch"],
        "decode-context": len(VARIANTS) * timed["context"],
        "prompt-context": (len(VARIANTS) - 1) * timed["context"],  # a level skips in decoding only
        "size": 2 * 3,
        "sparsity": 6,
        "error": 6,
        "inputs": 2,
    }
    for figure in figures(values):
        assert figure.marks == drawn[figure.id]
        root = ElementTree.fromstring(figure.svg)
        assert root.get("role") == "img" and root.get("viewBox", "").startswith("0 0 ")
        titles = [root.findtext("title"), root.findtext("desc")]
        assert titles == [figure.title, figure.about]
        assert {element.tag for element in root.iter()} <= SVG_TAGS
        assert figure.table.rows and re.match("[A-Z+−0-9]", figure.title)


def test_marks_stand_where_their_values_are(values: Values) -> None:
    """Batch 1 of the speed over batches: heights above the axis are as the medians."""
    figure = next(f for f in figures(values) if f.id == "decode-batch")
    root = ElementTree.fromstring(figure.svg)
    texts = {e.text: e for e in root.iter("text") if e.get("class") == "tick"}
    zero, top = (float(texts[name].get("y", "")) - 4 for name in ("0", "800"))
    (model,) = (g for g in root.iter("g") if "s-model" in g.get("class", "").split())
    found = [float(e.get("cy", "")) for e in model.iter("circle")]
    expected = [1 / 0.005, 8 / 0.011]
    for y, rate in zip(found, expected, strict=True):
        assert zero - y == pytest.approx((zero - top) * rate / 800, abs=0.05)
    whiskers = [e.get("d", "") for e in model.iter("path") if e.get("class") == "whisker"]
    low, high = (float(n) for n in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", whiskers[0])[0])
    assert zero - low == pytest.approx((zero - top) / 800 / 0.006, abs=0.05)
    assert zero - high == pytest.approx((zero - top) / 800 / 0.005, abs=0.05)


def test_cells_are_as_dark_as_their_values(values: Values) -> None:
    figure = next(f for f in figures(values) if f.id == "error")
    shares = {e.findtext("title"): e.get("style") for e in marks(figure.svg)}
    assert shares["block 1, mlp.down_proj: 0.060"] == "--share:100%"
    assert shares["block 0, self_attn.q_proj: 0.010"] == "--share:17%"
    assert figure.title == "Largest error: mlp.down_proj of block 1, 0.060"


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8))
def test_axes_hold_all_values(values: list[float]) -> None:
    axis = value_axis("", values, 234.0, 14.0, str)
    assert axis.low == 0 and axis.high >= max(values) * (1 - 1e-9)
    assert all(14 - 1e-6 <= axis(value) <= 234 for value in values)
    assert 2 <= len(axis.ticks) <= 12
    ratios = ratio_axis("", values, 234.0, 14.0)
    assert all(14 <= ratios(value) <= 234 for value in values)
    places = [ratios(value) for value, _ in ratios.ticks]
    assert places == sorted(places, reverse=True) and "dense" in [name for _, name in ratios.ticks]


def test_ticks() -> None:
    assert linear_ticks(0, 9.7) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(-0.03, 0.15) == [-0.05, 0, 0.05, 0.1, 0.15]
    assert linear_ticks(0, 0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] or len(linear_ticks(0, 0)) > 1


def test_the_verdict(values: Values) -> None:
    verdict = values["verdict"]
    assert verdict["target"] == {
        "max_ppl_increase": 0.05, "within": ["model"], "beyond": ["level 40%"],
    }  # fmt: skip
    cards = {card["label"]: (card["value"], card["tone"]) for card in verdict["cards"]}
    assert cards["perplexity"] == ("+2.5\u00a0%", "bad")
    assert cards["on disk"] == ("−40\u00a0%", "good")
    # paired by round: 2, 2.2 and 2 times
    assert cards["decoding"] == ("2.00×", "good")
    gained = " ".join(verdict["gained"])
    assert "small-50: faster than dense in every round: 2.00× (batch 1, context 16)" in gained
    assert "batch 8" not in gained.split("transformers")[0]
    assert "transformers' generate of the dense model in every round: 8.00× (batch 1" in gained
    without = " ".join(verdict["no_gain"])
    assert "small-50: no clear difference from dense: 1.00× (batch 8, context 16)" in without
    assert "level 40%: slower than dense in every round" in without
    assert "transformers" not in without
    cost = " ".join(verdict["cost"])
    assert "small-50: +2.5\u00a0% perplexity, more than chance explains" in cost
    assert "small-50: 1 of 1 values differ by more than chance: next_word acc −0.0350." in cost


def test_what_is_slower_than_transformers_is_said(values: Values) -> None:
    for load in values["speed"]["loads"]:
        model = next(row for row in load["rows"] if row["variant"] == "model")
        model["transformers_prompt_gain"] = gain((1.0, 1.0, 1.0), (2.0, 2.0, 4.0))
        break
    (said,) = (s for s in completed(values)["verdict"]["no_gain"] if "transformers" in s)
    assert said == (
        "Prompts, small-50: slower than transformers' generate of the dense model in every round: "
        "0.50× (batch 1, context 16)."
    )


def test_titles_do_not_call_noise_a_gain(values: Values) -> None:
    def title() -> str:
        return next(figure.title for figure in figures(values) if figure.id == "frontier")

    assert title() == "Fastest: small-50, 2.00× dense"
    rows = values["speed"]["loads"][0]["rows"]
    rows[1]["decode_gain"] = gain((1.0, 1.0, 1.0), (0.5, 0.5, 1.1))
    assert title() == "Nothing is clearly faster than the dense model here"
    rows[1]["decode_gain"] = gain((1.0, 1.0, 1.0), (2.0, 2.0, 1.1))
    assert title() == "Nothing is faster than the dense model here"


def test_a_busy_machine_is_told(values: Values) -> None:
    assert not values["warnings"]
    values["speed"]["load_average"] = 7.3
    (warning,) = completed(values)["warnings"]
    assert "load average 7.3 on 2 cores" in warning and warning in Seen(render_page(values)).text


def test_what_chance_explains(values: Values) -> None:
    values["quality"]["rows"][1]["forgotten"]["nll_increase_stderr"] = 0.02
    verdict = completed(values)["verdict"]
    assert any("which chance may explain" in sentence for sentence in verdict["cost"])
    (card,) = (card for card in verdict["cards"] if card["label"] == "perplexity")
    assert card["tone"] == "plain" and "may be chance" in card["detail"]
    values["quality"]["rows"][1]["forgotten"]["nll_increase_stderr"] = None
    assert "may be chance" in completed(values)["verdict"]["cards"][0]["detail"]


def test_a_model_that_grew_says_so(values: Values) -> None:
    values["size"][1]["disk"] = 2100
    verdict = completed(values)["verdict"]
    assert any("On disk it is no smaller: 2.00\u00a0kB → 2.10\u00a0kB." in s for s in
               verdict["no_gain"])  # fmt: skip
    assert not any("on disk" in sentence for sentence in verdict["gained"])


def test_gain() -> None:
    assert gain((2.0, 3.0, 4.0), (1.0, 1.0, 2.0)) == {
        "median": 2.0, "low": 2.0, "high": 3.0, "rounds": [2.0, 3.0, 2.0], "clear": "faster",
    }  # fmt: skip
    assert gain((1.0, 1.0, 1.0), (2.0, 2.0, 1.1))["clear"] == "slower"
    assert gain((1.0, 1.0, 1.0), (2.0, 2.0, 0.9))["clear"] is None
    assert gain((1.0, 1.0), (2.0, 2.0))["clear"] is None, "two rounds are too few"


SECTIONS = ("quality", "tasks", "speed", "against")


@pytest.mark.parametrize(
    "left_out", [c for n in range(1, 5) for c in itertools.combinations(SECTIONS, n)], ids=str
)
def test_sections_may_be_missing(values: Values, left_out: tuple[str, ...]) -> None:
    for name in left_out:
        values[name] = None
    if "against" in left_out:
        values = without_dense(values)
    if "speed" in left_out:
        for row in values["size"]:
            row["memory"] = None
    values["target"] = None if "quality" in left_out else values["target"]
    page, text = render_page(completed(values)), render_markdown(values)
    told = {one["how"] for one in values["missing"]}
    asked = {"quality": "leave out --no-quality", "tasks": "--tasks NAME,...",
             "speed": "leave out --no-speed", "against": "--against DENSE"}  # fmt: skip
    assert {asked[name] for name in left_out} <= told
    seen = Seen(page).text
    for rendered in (seen, text):
        assert not re.search(r"\bNone\b|\bnan\b|\binf\b", rendered)
        for name in left_out:
            assert asked[name] in rendered.replace("\\", "")
    ids = [figure.id for figure in figures(values)]
    assert ("decode-batch" in ids) == ("speed" not in left_out)
    assert page.count("<figure ") == len(ids) >= 3


def without_dense(values: Values) -> Values:
    """As `gather` makes it where no dense model was given: the model comes first."""
    if values["quality"] is not None:
        model, level = values["quality"]["rows"][1:]
        model |= {"ppl_increase": None, "kl": None, "flips": None, "forgotten": None}
        values["quality"]["rows"] = [model, level]
    if values["tasks"] is not None:
        values["tasks"]["rows"] = [{**values["tasks"]["rows"][1], "paired": None}]
    return values


def test_hostile_strings_stay_text(values: Values) -> None:
    for about in ("model", "against"):
        values[about] |= {"name": EVIL, "given": EVIL, "levels": [EVIL] if about == "model" else []}
    row = values["quality"]["rows"][2]
    row["level"] = EVIL
    found = row["forgotten"]
    found["hurt"][0]["text"] = found["passages"][0]["before"] = EVIL
    for piece in found["passages"][0]["pieces"]:
        piece["text"] = piece["choice"]["text"] = piece["dense_choice"]["text"] = EVIL
    values["quality"]["text"]["source"] = values["provenance"]["command"] = EVIL
    values["tasks"]["rows"][0]["task"] = values["tasks"]["notes"][0] = EVIL
    values["sparsity"]["linears"][0]["kind"] = EVIL
    values["beside"][0]["points"][0] |= {"label": EVIL, "series": EVIL}
    values["provenance"]["pruning"]["warnings"] = [EVIL]
    values["provenance"]["environment"]["device"] = values["speed"]["cpu"] = EVIL
    page = render_page(completed(values))
    seen = Seen(page)
    for tag, attributes in seen.tags:
        assert tag in PAGE_TAGS | SVG_TAGS
        assert not any(name.startswith("on") or name in ("src", "srcset") for name in attributes)
        assert re.match(r"#[a-z-]+$|data:,$", attributes.get("href") or "#x")
    shown = notation.clean(EVIL)
    assert seen.text.count(shown) > 15 and "\x1b" not in page
    for figure in figures(values):
        ElementTree.fromstring(figure.svg)
    text = render_markdown(values)
    assert "<script" not in text.replace("\\<", "") and "](http" not in text.replace("\\]", "")
    assert "\x1b" not in text
    check_tables(text)


def check_tables(text: str) -> None:
    """All rows of a table have as many cells as its head."""
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("| "):
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert len(cells) == 1, block


def test_the_page_needs_nothing_else(values: Values) -> None:
    page = render_page(values)
    assert not re.search(r"https?:|url\(|@import|<script|\bsrc=", page)
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page
    assert len(page) < 100_000


def test_the_text(values: Values) -> None:
    text = render_markdown(values)
    check_tables(text)
    assert text.startswith("# small-50: what it gained and what it cost\n")
    assert (
        "**Within the target of 5.0\u00a0% more perplexity: small-50; beyond it: level 40%.**"
        in (text)
    )
    assert "| small-50 | 4.100 | 1.400 ± 0.020 | +2.50\u00a0% | 0.41\u00a0% | yes |" in text
    assert (
        "| small-50 | 1 | 16 | 50.0\u00a0ms | 320 | 5.00\u00a0ms | 200 | 2.00× (2.00–2.20) |"
        in text
    )
    assert (
        "| next\\_word, 2-shot | acc | small-50 | 200 | 0.7100 ± 0.0200 | −0.0350 ± 0.0100 |"
        in text
    )
    assert "> …Once upon a **time**\\\\n **in é**" in text
    assert "pruned with | method wanda, pattern 0.5, target dense" in text


def test_flipped_tokens_in_context(values: Values) -> None:
    seen = Seen(render_page(values))
    flipped = [a for tag, a in seen.tags if tag == "span" and a.get("class") == "flip"]
    # of both rows two each, the second inside a character; one in the legend
    assert len(flipped) == 2 * 2 + 1
    (told,) = {a["title"] for _, a in seen.tags if (a.get("title") or "").startswith("“ time”")}
    assert told == (
        "“ time”: 75\u00a0% dense, 25\u00a0% now; KL 1.5; likeliest: “ time” 80\u00a0% dense, "
        "“ boat” 60\u00a0% now"
    )


def test_files_are_made_of_the_json_alone(values: Values, tmp_path: Path) -> None:
    write_report(values, tmp_path / "one")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        "report.json", "report.md", "report.html",
    }  # fmt: skip
    write_report(read_report_file(tmp_path / "one" / "report.json"), tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is no report.json"),
        ('{"schema": "other"}', "is no report.json"),
        ('{"schema": "prune_llm.report", "schema_version": 7}', "schema_version 7, this version"),
    ],
)
def test_files_of_others_are_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_report_file(file)


@pytest.mark.parametrize(
    ("value", "function", "written"),
    [
        (0.0213, notation.number, "0.02130"),
        (12345.6, notation.number, "12\u202f346"),
        (0.0, notation.number, "0"),
        (1.5e9, notation.number, "1.500e+09"),
        (None, notation.number, "–"),
        (-0.354, notation.signed, "−35.4\u00a0%"),
        (11.0, notation.signed, "×12.0"),
        (0.00032, notation.seconds, "320\u00a0µs"),
        (0.032, notation.seconds, "32.0\u00a0ms"),
        (64.0, notation.seconds, "64.0\u00a0s"),
        (1_530_000, notation.size, "1.53\u00a0MB"),
        ("a\n\x1b", notation.clean, "a\\n\\x1b"),
    ],
)
def test_notation(value: Any, function: Callable[[Any], str], written: str) -> None:
    assert function(value) == written


# -- other runs ---------------------------------------------------------------------------------


def points_of(content: Any, tmp_path: Path, name: str = "found.json") -> list[Values]:
    (tmp_path / name).write_text(json.dumps(content))
    points: list[Values] = read_beside(tmp_path / name)["points"]
    return points


def test_a_comparison_beside(tmp_path: Path) -> None:
    def row(method: str, pattern: str, ppl: float | None) -> Values:
        return {"method": method, "pattern": pattern, "quality": {"token_ppl": ppl}}

    rows = [row("dense", "", 4.0), row("wanda", "0.5", 5.0), row("wanda", "2:4", None)]
    points = points_of({"rows": rows, "knees": {}}, tmp_path)
    assert [(p["label"], p["weight_sparsity"], p["ppl_ratio"]) for p in points] == [
        ("wanda 0.5", 0.5, 1.25),
        ("wanda 2:4", 0.5, None),
    ]
    assert [p["series"] for p in points] == ["wanda", "wanda N:M"]


def test_a_frontier_beside(tmp_path: Path) -> None:
    def row(sparsity: float, inputs: float, speed: float | None) -> Values:
        return {
            "sparsity": sparsity,
            "activation_sparsity": inputs,
            "ppl_increase": {"search": 0.5, "held_out": sparsity / 10},
            "tokens_per_second": speed,
        }

    rows = [row(0.0, 0.0, 10.0), row(0.4, 0.3, 15.0), row(0.6, 0.0, None)]
    points = points_of({"rows": rows, "chosen": 1, "dense_ppl": {}}, tmp_path)
    assert [p["speed_ratio"] for p in points] == [1.0, 1.5, None]
    assert [p["ppl_ratio"] for p in points] == pytest.approx([1.0, 1.04, 1.06])
    assert points[1]["label"] == "40 % of the weights, 30 % of the inputs"


def test_a_sweep_beside(tmp_path: Path) -> None:
    def row(name: str, skipped: float | None, speed: float, increase: float | None) -> Values:
        return {
            "name": name, "method": "wanda", "sparsity": 0.5, "skipped": skipped,
            "ppl_increase": increase, "tokens_per_second": speed,
        }  # fmt: skip

    rows = [row("dense", None, 10.0, 0.0), row("wanda 0.5", None, 12.0, 0.1),
            row("wanda 0.5, level 40%", 0.4, 14.0, None)]  # fmt: skip
    points = points_of({"rows": rows, "fastest": "dense", "smallest": "dense"}, tmp_path)
    assert [(p["speed_ratio"], p["ppl_ratio"], p["input_sparsity"]) for p in points] == [
        (1.2, pytest.approx(1.1), 0.0),
        (1.4, None, 0.4),
    ]


def test_another_report_beside(values: Values, tmp_path: Path) -> None:
    points = points_of(values, tmp_path)
    assert [p["label"] for p in points] == ["small-50 model", "small-50 level 40%"]
    assert [p["ppl_ratio"] for p in points] == pytest.approx([1.025, 1.15])
    assert points[0]["speed_ratio"] == 2.0
    zeros = (100 * 0.4 + 200 * 0.5 + 300 * 0.6) / 600
    assert points[0]["weight_sparsity"] == pytest.approx(zeros)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": []}, "is none of comparison.json"),
        ([], "is none of"),
        ({"rows": [], "knees": {}}, r"is damaged \(IndexError"),
        ({"rows": [{}], "chosen": 0, "dense_ppl": {}}, r"is damaged \(KeyError"),
    ],
)
def test_files_that_are_none_of_ours(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        points_of(content, tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_beside(tmp_path / "not-there.json")


def test_the_values_are_what_they_seem() -> None:
    """The hand-made report has what the tests above count on."""
    values = report_values()
    assert values == copy.deepcopy(values) and json.loads(json.dumps(values)) == values
    assert len(values["speed"]["loads"]) == len(LOADS) == 3 and set(STEPS) == set(VARIANTS)
    assert not any(math.isnan(row["token_ppl"]) for row in values["quality"]["rows"])
