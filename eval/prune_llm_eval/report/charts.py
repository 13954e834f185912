"""Two kinds of picture: lines or points over two axes, and a heatmap of blocks and linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prune_llm_eval.report.drawing import WIDTH, Axis, picture, tag, text

LEFT, RIGHT, TOP, BOTTOM = 74.0, WIDTH - 14.0, 14.0, 234.0
HEIGHT = 280
RADIUS = 4.5
# between series that stand at one place
SIDE = 6.0
# the names of classes for series beyond dense, model and transformers
SLOTS = ("a", "b", "c", "d", "e", "f")
ROW, MOST_ROW_NUMBERS = 24.0, 40


@dataclass(frozen=True)
class Mark:
    """A point; ``low`` to ``high``: its spread; ``label``: what pointing at it tells."""

    x: float
    y: float
    label: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Marks of one colour and shape; ``slot``: of the colour."""

    name: str
    slot: str
    marks: tuple[Mark, ...]
    line: bool = True


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    title: str,
    description: str,
    baseline: float | None = None,
) -> str:
    """Lines over two axes; ``baseline``: a value of y to compare with."""
    inside = [grid(x, y)]
    if baseline is not None:
        at = y(baseline)
        inside.append(tag("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="baseline"))
    # side by side where lines share their places, so that no spread hides another
    step = SIDE if any(mark.low is not None for one in series for mark in one.marks) else 0.0
    for place, one in enumerate(series):
        inside.append(_series(one, x, y, (place - (len(series) - 1) / 2) * step))
    return picture(HEIGHT, title, description, *inside)


def grid(x: Axis, y: Axis) -> str:
    """Lines and numbers of both axes, and their names."""
    drawn = []
    for value, name in y.ticks:
        at = y(value)
        drawn.append(tag("line", x1=LEFT, x2=RIGHT, y1=at, y2=at, class_="grid"))
        drawn.append(
            tag("text", text(name), x=LEFT - 8, y=at + 4, class_="tick", text_anchor="end")
        )
    for value, name in x.ticks:
        at = x(value)
        drawn.append(tag("line", x1=at, x2=at, y1=BOTTOM, y2=BOTTOM + 5, class_="axis"))
        drawn.append(
            tag("text", text(name), x=at, y=BOTTOM + 19, class_="tick", text_anchor="middle")
        )
    drawn.append(tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="axis"))
    middle, height = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    drawn.append(
        tag("text", text(x.label), x=middle, y=HEIGHT - 6, class_="name", text_anchor="middle")
    )
    turned = {"transform": f"rotate(-90 13 {height:g})", "text_anchor": "middle"}
    drawn.append(tag("text", text(y.label), x=13, y=height, class_="name", **turned))
    return tag("g", *drawn)


def _series(series: Series, x: Axis, y: Axis, aside: float) -> str:
    marks = sorted(series.marks, key=lambda mark: mark.x)
    drawn = []
    if series.line and len(marks) > 1:
        points = " ".join(f"{x(mark.x) + aside:.2f},{y(mark.y):.2f}" for mark in marks)
        drawn.append(tag("polyline", points=points, class_="line"))
    for mark in marks:
        if mark.low is not None and mark.high is not None:
            drawn.append(_whisker(x(mark.x) + aside, y(mark.low), y(mark.high)))
        drawn.append(marker(series.slot, x(mark.x) + aside, y(mark.y), mark.label))
    return tag("g", *drawn, class_=f"series s-{series.slot}")


def _whisker(x: float, low: float, high: float) -> str:
    ends = (f"M{x - 4:.2f} {at:.2f}h8" for at in (low, high))
    return tag("path", d=f"M{x:.2f} {low:.2f}V{high:.2f}{''.join(ends)}", class_="whisker")


def marker(slot: str, x: float, y: float, label: str | None = None, size: float = RADIUS) -> str:
    """A shape for each slot, so that colour is not all that tells series apart."""
    about = [] if label is None else [tag("title", text(label))]
    kind = {"class_": "mark"}
    if slot in ("model", "f"):
        return tag("circle", *about, cx=x, cy=y, r=size + (slot == "model"), **kind)
    paths = {
        "dense": f"M{x - size:.2f} {y - size:.2f}h{2 * size}v{2 * size}h{-2 * size}z",
        "a": f"M{x:.2f} {y - size - 1:.2f}l{size + 1} {2 * size}h{-2 * size - 2}z",
        "b": f"M{x:.2f} {y - size - 1.5:.2f}l{size + 1.5} {size + 1.5}l{-size - 1.5} {size + 1.5}"
        f"l{-size - 1.5} {-size - 1.5}z",
        "c": f"M{x:.2f} {y + size + 1:.2f}l{size + 1} {-2 * size}h{-2 * size - 2}z",
    }
    cross = (
        f"M{x - size:.2f} {y - size:.2f}l{2 * size} {2 * size}"
        f"M{x - size:.2f} {y + size:.2f}l{2 * size} {-2 * size}"
    )
    if slot in paths:
        return tag("path", *about, d=paths[slot], **kind)
    plus = f"M{x - size:.2f} {y:.2f}h{2 * size}M{x:.2f} {y - size:.2f}v{2 * size}"
    return tag("path", *about, d=plus if slot == "e" else cross, class_="mark open")


@dataclass(frozen=True)
class Bar:
    """``number``: its value as it is written behind it."""

    group: str
    slot: str
    value: float
    number: str
    label: str


def bars(found: Sequence[Bar], title: str, description: str) -> str:
    """Bars from left to right, those of a group beneath its name, each group on its own scale."""
    drawn = []
    y = 4.0
    for group in dict.fromkeys(bar.group for bar in found):
        own = [bar for bar in found if bar.group == group]
        most = max(bar.value for bar in own) or 1.0
        drawn.append(tag("text", text(group), x=2, y=y + 14, class_="name"))
        y += 22
        for bar in own:
            drawn.append(_bar(bar, y, bar.value / most))
            y += 24
        y += 12
    return picture(y, title, description, *drawn)


def _bar(bar: Bar, y: float, share: float) -> str:
    length = max(1.0, share * (WIDTH - 90))
    about = tag("title", text(bar.label))
    shape = tag("rect", about, x=2, y=y, width=length, height=18, rx=3, class_="mark")
    number = tag("text", text(bar.number), x=length + 10, y=y + 13.5, class_="tick")
    return tag("g", shape, number, class_=f"series s-{bar.slot}")


@dataclass(frozen=True)
class Cell:
    """``share``: of the colour scale, 0 to 1; None: there is nothing to show."""

    row: str
    column: str
    share: float | None
    number: str
    label: str


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Cell],
    names: tuple[str, str],
    scale: tuple[str, str],
    title: str,
    description: str,
) -> str:
    """A cell for each row and column, darker for more; numbers in it where there is room.

    Args:
        names: of rows and columns; scale: the values of the lightest and the darkest colour.
    """
    left, top = 46.0, 40.0
    few = len(rows) <= MOST_ROW_NUMBERS
    row_height = ROW if few else 12.0
    width = (RIGHT + 12 - left) / len(columns)
    x = {name: left + place * width for place, name in enumerate(columns)}
    y = {name: top + place * row_height for place, name in enumerate(rows)}
    height = top + len(rows) * row_height
    drawn = [_columns(columns, x, width, top), _rows(rows, y, row_height, left, few)]
    drawn.append(tag("text", text(names[0]), x=left - 8, y=14, class_="name", text_anchor="end"))
    drawn.append(tag("text", text(names[1]), x=left, y=14, class_="name"))
    for cell in cells:
        box = x[cell.column], y[cell.row], width - 1.5, row_height - 1.5
        drawn.append(_cell(cell, box, few and len(columns) <= 8))
    drawn.append(_scale(scale, left, height + 10))
    return picture(height + 34, title, description, *drawn)


def _columns(columns: Sequence[str], x: dict[str, float], width: float, top: float) -> str:
    names = [
        tag("text", text(c), x=x[c] + width / 2, y=top - 6, class_="tick", text_anchor="middle")
        for c in columns
    ]
    return tag("g", *names)


def _rows(rows: Sequence[str], y: dict[str, float], height: float, left: float, every: bool) -> str:
    """A name for each row, or for every fourth where they are narrow."""
    shown = rows if every else rows[::4]
    names = [
        tag("text", text(r), x=left - 8, y=y[r] + height / 2 + 4, class_="tick", text_anchor="end")
        for r in shown
    ]
    return tag("g", *names)


def _cell(cell: Cell, box: tuple[float, float, float, float], numbered: bool) -> str:
    x, y, width, height = box
    share = "none" if cell.share is None else f"{100 * cell.share:.0f}%"
    fill = None if cell.share is None else f"--share:{share}"
    drawn = tag(
        "rect",
        tag("title", text(cell.label)),
        x=x,
        y=y,
        width=width,
        height=height,
        rx=2,
        class_="mark cell" if cell.share is not None else "mark cell empty",
        style=fill,
    )
    if not numbered:
        return drawn
    strong = " strong" if cell.share is not None and cell.share > 0.55 else ""
    middle = {"x": x + width / 2, "y": y + height / 2 + 4, "text_anchor": "middle"}
    return drawn + tag("text", text(cell.number), class_=f"number{strong}", **middle)


def _scale(scale: tuple[str, str], left: float, y: float) -> str:
    """The colours from least to most."""
    steps = 24
    width = 120 / steps
    boxes = [
        tag("rect", x=left + 62 + n * width, y=y, width=width + 0.3, height=10, class_="cell",
            style=f"--share:{100 * n / (steps - 1):.0f}%")
        for n in range(steps)
    ]  # fmt: skip
    low = tag("text", text(scale[0]), x=left + 56, y=y + 9, class_="tick", text_anchor="end")
    high = tag("text", text(scale[1]), x=left + 188, y=y + 9, class_="tick")
    return tag("g", low, *boxes, high)
