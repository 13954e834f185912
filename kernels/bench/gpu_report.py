"""The benchmark's page: what was asked and whether it is met, every row, what was left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gpu_cases import PREDICTED, TARGETS, Target, title
from gpu_run import BLOCK, Run

Row = dict[str, Any]
NOT_MEASURED = "not measured"


def targets(run: Run) -> list[Row]:
    """Of every target, masks and batch: speed-ups of each linear, of all four together and of the
    step at each context, and which of them reach what is asked; None where nothing was measured."""
    products = [row for row in run.rows if row["kind"] == "product"]
    steps = [row for row in run.rows if row["kind"] == "step"]
    found, expected = [], predicted()
    for target in TARGETS:
        masks = {str(r["masks"]) for r in [*products, *steps] if r["case"] == target.case}
        for mask in sorted(masks) or [""]:
            for rows in target.rows:
                row = _kernels(target, mask, rows, products) | _steps(target, mask, steps)
                name = title(target.case, mask)
                row["predicted"] = expected.get(("kernels", name, rows))
                row["predicted_step"] = expected.get(("step", name, rows))
                found.append(row)
    return found


def predicted() -> dict[tuple[str, str, int], float]:
    """Speed-ups of a block's linears, and of a step at context 256, by case and batch."""
    file = PREDICTED.with_suffix(".json")
    if not file.exists():  # the script without the project's reports
        return {}
    result = json.loads(file.read_text())
    kernels = {("kernels", r["case"], r["rows"]): r["speedup"] for r in result["blocks"]}
    steps = {("step", r["case"], 1): r["speedup"] for r in result["steps"] if r["context"] == 256}
    return kernels | steps


def _kernels(target: Target, masks: str, rows: int, products: list[Row]) -> Row:
    times = {
        (r["shape"], r["case"], r.get("masks", "")): r["us"] for r in products if r["rows"] == rows
    }
    ours = {name: times.get((name, target.case, masks)) for name in BLOCK}
    dense = {name: times.get((name, "dense", "")) for name in BLOCK}
    gains = {}
    for name in BLOCK:
        ours_us, dense_us = ours[name], dense[name]
        known = ours_us is not None and dense_us is not None
        gains[name] = round(dense_us / ours_us, 3) if known else None
    whole = None
    if None not in gains.values():
        whole = round(sum(filter(None, dense.values())) / sum(filter(None, ours.values())), 3)
    asked = {name: target.of(name) for name in BLOCK}
    return {
        "target": target.name, "masks": masks, "rows": rows, "kernels": gains, "asked": asked,
        "met": {name: _met(gains[name], asked[name]) for name in BLOCK},
        "block": whole, "block_met": _met(whole, target.kernel),
    }  # fmt: skip


def _steps(target: Target, masks: str, steps: list[Row]) -> Row:
    if target.step is None:
        return {"step_asked": None, "steps": {}, "steps_met": {}}
    gains = {
        str(r["context"]): r.get("speedup")
        for r in steps
        if r["case"] == target.case and r["masks"] == masks
    }
    met = {context: _met(gain, target.step) for context, gain in gains.items()}
    return {"step_asked": target.step, "steps": gains, "steps_met": met}


def _met(gain: float | None, asked: float) -> bool | None:
    return None if gain is None else gain >= asked


def markdown(run: Run) -> Iterator[str]:
    yield f"# GPU kernels: {run.about['device']}"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in run.about.items())
    if not run.setting.on_gpu:
        yield "**Its times mean nothing.**"
    yield ""
    yield from _target_table(targets(run))
    yield ""
    yield from _product_table([row for row in run.rows if row["kind"] == "product"])
    yield ""
    yield from _step_table([row for row in run.rows if row["kind"] == "step"])
    yield ""
    reads = [row["gb_per_s"] for row in run.rows if row["kind"] == "read"]
    checks = [row["checks"] for row in run.rows if row["kind"] == "check"]
    yield f"Read bandwidth measured by a sum: {reads[0] if reads else NOT_MEASURED} GB/s."
    yield f"Checked against float64 before: {checks[0] if checks else 'not to the end,'} cases."
    yield ""
    yield "Left out:"
    yield ""
    yield from (f"- {note}" for note in run.left_out or ["nothing"])


def _target_table(found: list[Row]) -> Iterator[str]:
    yield "## What was asked"
    yield ""
    yield "Kernels over cuBLAS in a graph, a list made for every linear; end to end over the faster"
    yield "of our plan with dense weights and torch's compiled step, by context. Predicted: before"
    yield "anything was measured, the step at context 256."
    yield ""
    names = " | ".join(BLOCK)
    yield f"| | masks | batch | {names} | all four (asked; predicted) | step (asked; predicted) |"
    yield "|---" * (len(BLOCK) + 5) + "|"
    for row in found:
        each = " | ".join(_verdict(row["kernels"][n], row["met"][n]) for n in BLOCK)
        asked = " / ".join(str(value) for value in sorted(set(row["asked"].values())))
        four = _verdict(row["block"], row["block_met"]) + _known(asked, row["predicted"])
        yield (
            f"| {row['target']} | {row['masks']} | {row['rows']} | {each} | {four} "
            f"| {_step_verdict(row)} |"
        )


def _step_verdict(row: Row) -> str:
    if row["step_asked"] is None:
        return ""
    gains = [f"{context}: {_verdict(gain, row['steps_met'][context])}"
             for context, gain in row["steps"].items()]  # fmt: skip
    known = _known(str(row["step_asked"]), row["predicted_step"])
    return (", ".join(gains) or NOT_MEASURED) + known


def _known(asked: str, expected: float | None) -> str:
    return f" ({asked})" if expected is None else f" ({asked}; {expected:.2f}x)"


def _verdict(gain: float | None, met: bool | None) -> str:
    if gain is None:
        return NOT_MEASURED
    return f"{gain:.2f}x {'pass' if met else '**fail**'}"


def _product_table(rows: list[Row]) -> Iterator[str]:
    yield "## Products"
    yield ""
    yield "Medians, 10th to 90th percentile; bytes of the channels that are read, their share of"
    yield "the read bandwidth; the largest error against float64 over that of torch's dense product"
    yield ""
    yield "| shape | case | masks | batch | us | over dense | MB read | share | error |"
    yield "|---" * 9 + "|"
    for row in rows:
        yield (
            f"| {row['shape']} | {row['case']} | {row.get('masks', '')} | {row['rows']} "
            f"| {_time(row)} | {row.get('speedup', '')} | {row['bytes'] / 1e6:.1f} "
            f"| {row['limit']} | {row.get('error', '')} |"
        )


def _step_table(rows: list[Row]) -> Iterator[str]:
    yield "## Decode steps, batch 1"
    yield ""
    yield ("| case | masks | context | us | tokens/s | over our dense plan | over compiled "
           "| channels read | MB of weights | share |")  # fmt: skip
    yield "|---" * 10 + "|"
    for row in rows:
        read = row.get("channels_read")
        shares = "" if read is None else ", ".join(f"{n} {v}" for n, v in read.items())
        yield (
            f"| {row['case']} | {row['masks']} | {row['context']} | {_time(row)} "
            f"| {row['tokens_per_second']} | {row.get('over_plan', '')} "
            f"| {row.get('over_compiled', '')} | {shares} | {row['bytes'] / 1e6:.1f} "
            f"| {row['limit']} |"
        )


def _time(row: Row) -> str:
    return f"{row['us']} ({row['us_p10']} to {row['us_p90']})"
