"""What was gained, what it cost, and where nothing was gained: sentences out of a report's values.

Text of values and nothing more; a sentence that the values do not carry is not said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prune_llm_eval.report.notation import (
    MINUS,
    number,
    per_second,
    percent,
    signed,
    size,
    times,
)
from prune_llm_eval.report.points import (
    display,
    name_of,
    overall_sparsity,
    quality_row,
    size_row,
    speed_row,
)

NORMAL_95 = 1.96
# an increase of the loss within so many standard errors of 0 may be chance
Card = dict[str, str]


def decide(report: dict[str, Any]) -> dict[str, Any]:
    """``target``: whether it is met, and by which levels; ``cards``: the headline figures;
    ``gained``, ``cost``, ``no_gain``: sentences."""
    return {
        "target": _target(report),
        "cards": list(_cards(report)),
        "gained": list(_gained(report)),
        "cost": list(_cost(report)),
        "no_gain": list(_no_gain(report)),
    }


def _target(report: dict[str, Any]) -> dict[str, Any] | None:
    """None where no target was given or nothing was compared."""
    target, quality = report["target"], report["quality"]
    if target is None or quality is None:
        return None
    rows = [row for row in quality["rows"] if row["ppl_increase"] is not None]
    if not rows:
        return None
    within = [name_of(row) for row in rows if row["ppl_increase"] <= target]
    beyond = [name_of(row) for row in rows if not row["ppl_increase"] <= target]
    return {"max_ppl_increase": target, "within": within, "beyond": beyond}


def _cards(report: dict[str, Any]) -> Iterator[Card]:
    """A label, a value and what it is made of; ``tone``: good, bad or plain."""
    model, dense = quality_row(report, "model"), quality_row(report, "dense")
    if model is not None and dense is not None:
        yield {
            "label": "perplexity",
            "value": signed(model["ppl_increase"]),
            "detail": f"{number(dense['token_ppl'])} → {number(model['token_ppl'])}, "
            + ("more than chance" if significant(model) else "may be chance"),
            "tone": "plain" if not significant(model) else _tone(-model["ppl_increase"]),
        }
        yield {
            "label": "flipped tokens",
            "value": percent(model["flips"]),
            "detail": f"KL {number(model['kl'], 3)} nats a token",
            "tone": "plain",
        }
    elif model is not None:
        detail = f"{number(model['nll'])} nats a token"
        value = number(model["token_ppl"])
        yield {"label": "perplexity", "value": value, "detail": detail, "tone": "plain"}
    zeros = overall_sparsity(report)
    if zeros is not None:
        detail = "of the weights in the blocks' linears"
        yield {"label": "zeros", "value": percent(zeros), "detail": detail, "tone": "plain"}
    yield _size_card(report, "on disk", "disk")
    if report["speed"] is not None:
        yield _size_card(report, "weights in memory", "memory")
        yield from _speed_cards(report)


def significant(row: dict[str, Any]) -> bool:
    """Whether the loss differs from the dense model's by more than 1.96 standard errors."""
    found = row["forgotten"]
    stderr = found["nll_increase_stderr"]
    return bool(stderr) and abs(found["nll_increase"]) > NORMAL_95 * stderr


def _tone(change: float) -> str:
    return "good" if change > 0 else "bad" if change < 0 else "plain"


def _size_card(report: dict[str, Any], label: str, what: str) -> Card:
    before, after = (_bytes(size_row(report, role), what) for role in ("dense", "model"))
    return {
        "label": label,
        "value": signed(after / before - 1, 0),
        "detail": f"{size(before)} → {size(after)}",
        "tone": _tone(before - after),
    }


def _bytes(row: dict[str, Any], what: str) -> int:
    return int(row["disk"] if what == "disk" else row["memory"]["weights"])


def _speed_cards(report: dict[str, Any]) -> Iterator[Card]:
    """Decoding and reading a prompt, at the smallest load."""
    load = report["speed"]["loads"][0]
    dense, model = speed_row(report, "dense"), speed_row(report, "model")
    assert dense is not None and model is not None
    for label, rate, gain in (
        ("decoding", "decode_tokens_per_second", "decode_gain"),
        ("prompts", "prompt_tokens_per_second", "prompt_gain"),
    ):
        clear = model[gain]["clear"]
        yield {
            "label": label,
            "value": times(model[gain]["median"]),
            "detail": f"{per_second(dense[rate]['median'])} → {per_second(model[rate]['median'])} "
            f"tokens/s, {_under(load)}",
            "tone": {"faster": "good", "slower": "bad", None: "plain"}[clear],
        }


def _under(load: dict[str, Any]) -> str:
    return f"batch {load['batch']}, context {load['context']}"


def _gained(report: dict[str, Any]) -> Iterator[str]:
    for label, what in (("on disk", "disk"), ("of weights in memory", "memory")):
        if what == "disk" or report["speed"] is not None:
            before, after = (_bytes(size_row(report, role), what) for role in ("dense", "model"))
            if after < before:
                yield (
                    f"{percent(1 - after / before, 0)} fewer bytes {label}: {size(before)} → "
                    f"{size(after)}."
                )
    for name in variants(report):
        found = _which(report, name, "decode_gain", "faster")
        if found:
            yield f"Decoding, {display(report, name)}: faster than dense in every round: {found}."
    found = _which(report, "model", "transformers_gain", "faster") if variants(report) else ""
    if found:
        yield (
            f"Decoding, {display(report, 'model')}: faster than transformers' generate of the "
            f"dense model in every round: {found}."
        )


def _which(report: dict[str, Any], name: str, gain: str, clear: str | None) -> str:
    """The loads under which a variant was clearly faster, clearly slower or neither (None)."""
    return ", ".join(
        f"{times(row[gain]['median'])} ({_under(load)})"
        for load, row in timed(report, name)
        if row[gain]["clear"] == clear
    )


def variants(report: dict[str, Any]) -> list[str]:
    """The model and its levels, as far as they were timed."""
    if report["speed"] is None:
        return []
    rows = report["speed"]["loads"][0]["rows"]
    return [row["variant"] for row in rows if row["variant"] not in ("dense", "transformers")]


def timed(report: dict[str, Any], name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every load and what the variant did under it."""
    return [
        (load, row)
        for load in report["speed"]["loads"]
        for row in load["rows"]
        if row["variant"] == name
    ]


def _cost(report: dict[str, Any]) -> Iterator[str]:
    quality = report["quality"]
    for row in [] if quality is None else quality["rows"]:
        if row["forgotten"] is None:
            continue
        found = row["forgotten"]
        sure = "more than chance explains" if significant(row) else "which chance may explain"
        name = _capital(display(report, name_of(row)))
        yield (
            f"{name}: {signed(row['ppl_increase'])} perplexity, {sure}; KL "
            f"{number(row['kl'], 3)} nats a token; {percent(row['flips'])} of the likeliest tokens "
            f"changed, {percent(found['lost'])} were right and no longer are, "
            f"{percent(found['gained'])} the other way round."
        )
    if report["tasks"] is not None:
        yield from _task_sentences(report)


def _capital(name: str) -> str:
    """Of a level; a model keeps its name."""
    return name.capitalize() if name.startswith("level ") else name


def _task_sentences(report: dict[str, Any]) -> Iterator[str]:
    compared = [row for row in report["tasks"]["rows"] if row["paired"] is not None]
    for name in dict.fromkeys(row["model"] for row in compared):
        own = [row for row in compared if row["model"] == name]
        differ = [row for row in own if row["paired"]["significant"]]
        counts = f"{len(differ)} of {len(own)} values differ by more than chance"
        text = f"Tasks, {display(report, name)}: {counts}"
        listed = ", ".join(
            f"{row['task']} {row['metric']} {row['paired']['difference']:+.4f}".replace("-", MINUS)
            for row in differ
        )
        yield f"{text}: {listed}." if listed else f"{text}."


def _no_gain(report: dict[str, Any]) -> Iterator[str]:
    """Said for every load, so that no reader takes the best one for all."""
    for what, gain, names in (
        ("Decoding", "decode_gain", variants(report)),
        ("Prompts", "prompt_gain", variants(report)[:1]),
    ):
        for name in names:
            slower = _which(report, name, gain, "slower")
            unclear = _which(report, name, gain, None)
            parts = [f"slower than dense in every round: {slower}"] if slower else []
            parts += [f"no clear difference from dense: {unclear}"] if unclear else []
            if parts:
                yield f"{what}, {display(report, name)}: {'; '.join(parts)}."
    for what, gain in (
        ("Decoding", "transformers_gain"),
        ("Prompts", "transformers_prompt_gain"),
    ):
        slower = _which(report, "model", gain, "slower") if variants(report) else ""
        if slower:
            yield (
                f"{what}, {display(report, 'model')}: slower than transformers' generate of the "
                f"dense model in every round: {slower}."
            )
    if any(row["cached"] for name in variants(report) for _, row in timed(report, name)):
        yield (
            "The weights fit a processor's cache, where reading less saves little; this says "
            "nothing of models that do not fit."
        )
    disk = {role: _bytes(size_row(report, role), "disk") for role in ("dense", "model")}
    if disk["model"] >= disk["dense"]:
        yield f"On disk it is no smaller: {size(disk['dense'])} → {size(disk['model'])}."
