"""The page of a report in a real browser: light and dark, on a desk and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, find_browser, open_page
from report_values import EVIL, completed, report_values

from prune_llm_eval.report.figures import figures
from prune_llm_eval.report.files import write_report

COMMITTED = sorted((Path(__file__).parents[2] / "eval" / "reports").glob("*/report.html"))
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
# what every figure draws: its marks, those of no size, text that is cut or overlaps
LOOK = """
const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1
  && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
return [...document.querySelectorAll('figure')].map(figure => {
  const box = element => element.getBoundingClientRect();
  const marks = [...figure.querySelectorAll('.picture .mark')].map(box);
  const texts = [...figure.querySelectorAll('.picture .tick, .picture .name')];
  const frame = box(figure);
  const clash = texts.filter((one, n) => texts.some((other, m) => m > n
    && overlap(box(one), box(other))));
  const picture = box(figure.querySelector('.picture'));
  return {id: figure.id, marks: marks.length, expected: Number(figure.dataset.marks),
    empty: marks.filter(m => !(m.width > 0 && m.height > 0)).length,
    outside: marks.filter(m => !inside(m, frame)).length,
    cut: texts.filter(t => !inside(box(t), frame)).map(t => t.textContent),
    clash: clash.map(t => t.textContent),
    letters: texts.length ? Math.min(...texts.map(t => box(t).height)) : 99,
    width: picture.width, height: picture.height};
});
"""
COLOURS = """
const of = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
return [of('body', 'backgroundColor'), of('body', 'color'), of('.sub', 'color'),
  of('.picture .tick', 'fill')];
"""


def test_a_missing_browser_fails_in_ci_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("browser.shutil.which", lambda _name: None)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must have them"):
        find_browser()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        find_browser()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a long, hostile name and text, and more blocks than there are numbers for."""
    values = report_values()
    values["model"]["name"] = EVIL + "-a-rather-long-name-without-any-place-to-break" * 2
    values["quality"]["rows"][1]["forgotten"]["passages"][0]["before"] = EVIL
    first = values["sparsity"]["linears"]
    values["sparsity"]["linears"] = [
        {**one, "block": block} for block in range(48) for one in first[:3]
    ]
    folder = tmp_path_factory.mktemp("report")
    write_report(completed(values), folder)
    return folder / "report.html"


def luminance(colour: str) -> float:
    """Of "rgb(r, g, b)", as WCAG defines it."""
    parts = [float(n) / 255 for n in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def check(browser: Page, file: Path, width: int, scheme: str) -> list[dict[str, Any]]:
    """Everything that holds of any report in any view; what was found of its figures."""
    browser.log("browser")
    browser.show(file.as_uri(), width, 844, scheme)
    assert browser.requests() == [file.as_uri()], "the page asked for something else"
    assert browser.log("browser") == [], "the console has something to say"
    across, inner = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner == width and across <= width, "the page is wider than the screen"
    ground, *inks = browser.run(COLOURS)
    assert (luminance(ground) > 0.5) == (scheme == "light")
    assert all(contrast(ink, ground) >= 4.5 for ink in inks)
    found: list[dict[str, Any]] = browser.run(LOOK)
    for figure in found:
        assert figure["marks"] == figure["expected"] > 0, figure
        assert not figure["empty"] and not figure["outside"], figure
        assert not figure["cut"] and not figure["clash"], figure
        assert figure["letters"] >= 10 and figure["height"] > 100, figure
        assert figure["width"] > 0.8 * min(width, 480), figure
    return found


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_figure_is_drawn(
    browser: Page, by_hand: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    found = check(browser, by_hand, width, scheme)
    values = json.loads((by_hand.parent / "report.json").read_text())
    expected = {f"figure-{figure.id}": figure.marks for figure in figures(values)}
    assert {figure["id"]: figure["marks"] for figure in found} == expected
    assert expected["figure-sparsity"] == 48 * 3
    browser.screenshot(tmp_path / "page.png")
    from PIL import Image

    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width and image.height > 3000
        colours = image.convert("RGB").resize((width // 4, image.height // 4)).getcolors(1 << 20)
    assert colours is not None and len(colours) > 200  # pictures, not an empty page


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_committed_reports(browser: Page, file: Path, width: int, scheme: str) -> None:
    found = {figure["id"] for figure in check(browser, file, width, scheme)}
    assert {"figure-quality", "figure-frontier", "figure-decode-batch", "figure-error"} <= found
    sizes = [part.stat().st_size for part in file.parent.iterdir()]
    assert len(sizes) == 3 and max(sizes) < 500_000


def test_what_is_folded_opens(browser: Page, by_hand: Path) -> None:
    """Without a script: the tables beside the pictures, and the passages of a level."""
    browser.show(by_hand.as_uri(), 390, 844, "light")
    opened = browser.run(
        "const all = [...document.querySelectorAll('details')];"
        "all.forEach(one => one.querySelector('summary').click());"
        "return all.map(one => [one.open, one.scrollHeight > 40])"
    )
    assert len(opened) >= 10 and all(state == [True, True] for state in opened)
    across = browser.run("return document.documentElement.scrollWidth")
    assert across <= 390, "an open table makes the page wider"
