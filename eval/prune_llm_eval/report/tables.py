"""The tables of a report: values of report.json as text, the same for Markdown and the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prune_llm_eval.report.notation import (
    NARROW,
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
from prune_llm_eval.report.points import display, name_of
from prune_llm_eval.report.verdict import significant

HURT_SHOWN = 12


@dataclass(frozen=True)
class Table:
    """``rows`` of text under ``columns``; the first column is text, the others are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def quality_table(report: dict[str, Any]) -> Table:
    quality = report["quality"]
    compared = any(row["forgotten"] is not None for row in quality["rows"])
    columns = ("model", "token_ppl", "nats/token")
    more = ("change", "± s.e.", "differs", "KL", "flipped", "zeros", "inputs skipped")
    rows = [
        (*_quality_cells(report, row), *(_change_cells(row) if compared else ()))
        for row in quality["rows"]
    ]
    text = quality["text"]
    note = (
        f"{text['tokens']} predicted tokens of {clean(str(text['source']))} in {text['windows']} "
        f"windows of {text['seq_len']}. "
    )
    if compared:
        note += (
            "change: of the perplexity, from the first row; ± s.e.: standard error of it, paired "
            "by window; differs: by more than 1.96 of them; KL: from the first row, nats a token; "
            "flipped: tokens whose likeliest continuation changed; zeros: in the blocks' linears; "
            "inputs skipped: realised, weighted by the weights that they spare."
        )
    if text["protocol"] != "all-sparse":
        note += f" Protocol {text['protocol']}: only the second half of a window is scored."
    return Table((*columns, *(more if compared else ("zeros",))), tuple(rows), note)


def _quality_cells(report: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    spread = "" if row["nll_stderr"] is None else f" ± {row['nll_stderr']:.3f}"
    return display(report, name_of(row)), number(row["token_ppl"]), f"{row['nll']:.3f}{spread}"


def _change_cells(row: dict[str, Any]) -> tuple[str, ...]:
    zeros, skipped = percent(row["zeros"]), percent(row["skipped"])
    found = row["forgotten"]
    if found is None:
        return (UNKNOWN,) * 5 + (zeros, skipped)
    stderr = found["nll_increase_stderr"]
    return (
        signed(row["ppl_increase"], 2),
        # of a ratio of perplexities, whose logarithm has this error
        percent(None if stderr is None else (1 + row["ppl_increase"]) * stderr, 2),
        "yes" if significant(row) else "no",
        number(row["kl"], 3),
        percent(row["flips"], 2),
        zeros,
        skipped,
    )


def forgotten_tables(row: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """By position, by frequency, and the tokens hurt most."""
    found = row["forgotten"]
    columns = ("tokens", "KL", "flipped", "nats/token")
    for title, first, key in (
        ("By the tokens read before", "behind", "by_position"),
        ("By how often the token comes", "times seen", "by_frequency"),
    ):
        yield title, Table((first, *columns), tuple(_bucket(one) for one in found[key]))
    hurt = found["hurt"][:HURT_SHOWN]
    if hurt:
        rows = tuple((f"“{clean(one['text'])}”", *_harm(one)) for one in hurt)
        note = "Tokens that came ten times or more, by how much less likely they became."
        yield "Hurt most", Table(("token", *columns), rows, note)


def _bucket(one: dict[str, Any]) -> tuple[str, ...]:
    span = f"{one['low']}" if one["low"] == one["high"] else f"{one['low']}–{one['high']}"
    return (span, *_harm(one))


def _harm(one: dict[str, Any]) -> tuple[str, ...]:
    change = f"{one['nll_increase']:+.3f}".replace("-", "−")
    return (str(one["tokens"]), number(one["kl"], 3), percent(one["flips"]), change)


def task_table(report: dict[str, Any]) -> Table:
    tasks = report["tasks"]
    rows = tuple(_task_cells(report, row) for row in tasks["rows"])
    note = (
        f"lm-eval {tasks['lm_eval']}; value ± standard error; change: from the first model, ± "
        "standard error of the difference paired by document; better/worse: documents that "
        "changed; differs: by more than 1.96 standard errors, as one equal pair in 20 by chance."
    )
    columns = ("task", "metric", "model", "documents", "value", "change", "better/worse", "differs")
    return Table(columns, rows, " ".join([note, *map(clean, tasks["notes"])]))


def _task_cells(report: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']}, {row['filter']}"
    start = (
        f"{clean(row['task'])}, {row['num_fewshot']}-shot",
        clean(metric),
        display(report, row["model"]),
        str(row["documents"]),
        _plus_minus(row["value"], row["stderr"]),
    )
    paired = row["paired"]
    if paired is None:
        return (*start, UNKNOWN, UNKNOWN, UNKNOWN)
    counts = UNKNOWN
    if paired["changed"] is not None and paired["better"] is not None:
        counts = f"{paired['better']}/{paired['changed'] - paired['better']}"
    differs = {True: "yes", False: "no", None: UNKNOWN}[paired["significant"]]
    change = _plus_minus(paired["difference"], paired["stderr"], "+").replace("-", "−")
    return (*start, change, counts, differs)


def _plus_minus(value: float, stderr: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def kind_table(report: dict[str, Any]) -> Table:
    """Linears of one kind over all blocks."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in report["sparsity"]["linears"]:
        kinds.setdefault(one["kind"], []).append(one)
    rows = [_kind_cells(clean(kind), own) for kind, own in kinds.items()]
    rows.append(_kind_cells("all", report["sparsity"]["linears"]))
    note = "error: relative squared error of outputs on the calibration tokens, mean of linears."
    return Table(("linear", "n", "weights", "asked", "zeros", "error"), tuple(rows), note)


def _kind_cells(kind: str, own: list[dict[str, Any]]) -> tuple[str, ...]:
    weights = sum(one["weights"] for one in own)
    asked = [one for one in own if one["asked"] is not None]
    errors = [one["error"] for one in own if one["error"] is not None]
    wanted = sum(one["asked"] * one["weights"] for one in asked)
    return (
        kind,
        str(len(own)),
        f"{weights:,}".replace(",", NARROW),
        percent(wanted / sum(one["weights"] for one in asked), 2) if asked else UNKNOWN,
        percent(sum(one["sparsity"] * one["weights"] for one in own) / weights, 2),
        number(sum(errors) / len(errors), 3) if errors else UNKNOWN,
    )


def size_table(report: dict[str, Any]) -> Table:
    rows = []
    for row in report["size"]:
        memory = row["memory"] or {}
        cells = [memory.get(name) for name in ("weights", "process", "libraries")]
        known = (UNKNOWN if value is None else size(value) for value in cells)
        rows.append((display(report, row["role"]), size(row["disk"]), *known))
    note = (
        "on disk: all tensors; weights: as they lie in memory; process: what a process took to "
        "load and decode, beside the interpreter and libraries."
    )
    if report["against"] is None:
        note += " dense: this model with its zeros stored as zeros."
    columns = ("model", "on disk", "weights in memory", "process", "libraries")
    return Table(columns, tuple(rows), note)


def speed_table(report: dict[str, Any]) -> Table:
    """Medians of the rounds, the spread of what is compared."""
    rows = []
    for load in report["speed"]["loads"]:
        under = (str(load["batch"]), str(load["context"]))
        for row in load["rows"]:
            name, *cells = _speed_cells(report, row)
            rows.append((name, *under, *cells))
    about = report["speed"]
    config = about["config"]
    note = (
        f"Medians of {config['rounds']} rounds in turns, on {about['threads']} "
        f"thread{'s' * (about['threads'] > 1)} of "
        f"{clean(about['cpu'])}, {about['dtype']}, {config['tokens']} tokens each. TTFT: until "
        "every sequence has its first token; TPOT: until each has one more; gain: times as fast as "
        f"{about['baseline']}, least to most of the rounds; read: bytes a token must read; of "
        "bandwidth: share of what memory delivered in the same rounds, none for weights that fit a "
        f"cache. {display(report, 'model')} runs by {clean(about['engines']['model'])}."
    )
    load = ("model", "batch", "context", "TTFT", "prompt tokens/s", "TPOT", "decode tokens/s")
    return Table((*load, "decode gain", "read", "of bandwidth"), tuple(rows), note)


def _speed_cells(report: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    read, share = row["bytes_per_token"], row["bandwidth_share"]
    name = display(report, row["variant"])
    if row["active"] is not None:
        name += f" ({percent(1 - row['active'], 0)} skipped)"
    return (
        name,
        seconds(row["ttft"]["median"]),
        per_second(row["prompt_tokens_per_second"]["median"]),
        seconds(row["tpot"]["median"]),
        per_second(row["decode_tokens_per_second"]["median"]),
        gain_text(row["decode_gain"]),
        UNKNOWN if read is None else size(read),
        UNKNOWN if share is None or row["cached"] else percent(share["median"], 0),
    )


def gain_text(gain: dict[str, Any] | None) -> str:
    """With its spread."""
    if gain is None:
        return UNKNOWN
    return f"{times(gain['median'])} ({gain['low']:.2f}–{gain['high']:.2f})"


def provenance_table(report: dict[str, Any]) -> Table:
    """What made the figures."""
    told = report["provenance"]
    rows = [("command", told["command"] or UNKNOWN), ("date", f"{told['date']}")]
    rows.append(("took", seconds(told["seconds"])))
    for title in ("model", "against"):
        about = report[title]
        if about is not None:
            rows.append(
                (title, f"{about['given']}, {about['architecture']}, {about['weights']} weights")
            )
            rows.append((f"{title} sha256", about["sha256"]))
    if report["quality"] is not None:
        text = report["quality"]["text"]
        rows.append(("text", f"{text['source']}, sha256 of its tokens {text['sha256']}"))
    environment = told["environment"]
    rows += [(str(key), str(value)) for key, value in environment.items()]
    rows += list(_pruning_rows(told["pruning"] or {}))
    return Table(("", ""), tuple((clean(a), clean(str(b))) for a, b in rows))


def _pruning_rows(pruning: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How the model came to be, out of its own prune_report.json."""
    if not pruning:
        return
    yield "pruned from", f"{pruning.get('model')}, sha256 {pruning.get('model_sha256')}"
    config = pruning.get("config") or {}
    settings = ", ".join(
        f"{key} {value}" for key, value in config.items() if value not in (None, [], ())
    )
    yield "pruned with", settings
    if pruning.get("calibration"):
        calibration = pruning["calibration"]
        yield (
            "calibration",
            f"{calibration.get('source')}, {calibration.get('samples')} samples of "
            f"{calibration.get('seq_len')} tokens, sha256 {calibration.get('sha256')}",
        )
    if pruning.get("seconds") is not None:
        yield "pruning took", seconds(pruning["seconds"])
