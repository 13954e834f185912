"""What a model card says about the cost: measured figures, in tables and in the hub's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prune_llm.card_facts import CardFacts, shown_text
from prune_llm.card_markdown import clean, escape, table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

DENSE = "dense"
TASK_TYPE = "text-generation"


def cost_lines(facts: CardFacts) -> list[str]:
    """Blocks of Markdown; where nothing was measured, how to measure."""
    told = {"text": _text, "tasks": _tasks, "speed": _speed}
    blocks = [
        block for entry in facts.measured for block in told.get(entry["kind"], _unknown)(entry)
    ]
    blocks += _search(facts.pruning.get("search"))
    blocks += _levels(facts.levels)
    blocks += _frontier(facts.frontier)
    if not blocks:
        blocks = [
            "Not measured yet. `prune-llm eval DIRECTORY --against BASE --text FILE --update-card` "
            "puts perplexity, KL divergence and flipped tokens here."
        ]
    return blocks


def _unknown(entry: dict[str, Any]) -> list[str]:
    """Written by a later version."""
    return [f"Also measured: {escape(str(entry.get('kind')))}, on {escape(str(entry.get('on')))}."]


def _text(entry: dict[str, Any]) -> list[str]:
    rows = [["", "token perplexity", "KL to dense", "flipped tokens", "inputs skipped"]]
    if entry.get("dense"):
        rows.append(["dense model", _number(entry["dense"]["token_ppl"], ".4g"), "", "", ""])
    for row in entry["rows"]:
        rows.append(
            [
                _level_name(row["level"]),
                f"{_number(row['token_ppl'], '.4g')}{_increase(row, entry.get('dense'))}",
                _number(row.get("kl"), ".4f"),
                _number(row.get("flips"), ".2%"),
                _number(row.get("skipped"), ".1%"),
            ]
        )
    note = (
        f"{entry['tokens']:,} predicted tokens of {escape(shown_text(entry['on']))} in windows of "
        f"{entry['seq_len']}; perplexity depends on the window. {_where(entry)}"
    )
    return [table(rows), note]


def _increase(row: dict[str, Any], dense: dict[str, Any] | None) -> str:
    own, base = row["token_ppl"], None if dense is None else dense["token_ppl"]
    return f" ({own / base - 1:+.1%})" if own and base else ""


def _tasks(entry: dict[str, Any]) -> list[str]:
    rows = [["task", "metric", "level", "value", "dense model", "change"]]
    for row in entry["rows"]:
        rows.append(
            [
                escape(row["task"]),
                escape(_metric(row)),
                _level_name(row["level"]),
                _plus_minus(row["value"], row.get("stderr"), ".4f"),
                _number(row.get("dense"), ".4f"),
                _plus_minus(row.get("difference"), row.get("difference_stderr"), "+.4f"),
            ]
        )
    note = (
        f"lm-eval {escape(str(entry.get('lm_eval')))}; value ± standard error, change ± standard "
        f"error of the paired difference. {_where(entry)}"
    )
    if entry.get("limit") is not None:
        note += f" Only the first {entry['limit']} documents of each task."
    return [table(rows), note]


def _metric(row: dict[str, Any]) -> str:
    filtered = "" if row["filter"] == "none" else f" {row['filter']}"
    return f"{row['metric']}{filtered}, {row['num_fewshot']}-shot ({row['documents']})"


def _speed(entry: dict[str, Any]) -> list[str]:
    rows = [["", "tokens/s", "dense model", "faster"]]
    for row in entry["rows"]:
        own, dense = row["tokens_per_second"], row["dense"]
        rows.append(
            [_level_name(row["level"]), f"{own:.1f}", f"{dense:.1f}", f"{own / dense:.2f}x"]
        )
    return [table(rows), f"Decoding, {escape(str(entry['on']))}, in turns. {_where(entry)}"]


def _search(search: dict[str, Any] | None) -> list[str]:
    if not search:
        return []
    increase, windows = search["ppl_increase"], search["windows"]
    return [
        f"Pruned as far as {100 * search['max_ppl_increase']:g}% more perplexity allows: "
        f"{increase['held_out']:+.2%} on {windows['held_out']} windows of the calibration text "
        f"that neither pruning nor the search saw, {increase['search']:+.2%} on the "
        f"{windows['search']} it was searched on."
    ]


def _levels(report: dict[str, Any]) -> list[str]:
    if not report.get("levels"):
        return []
    text = "other" if "other" in report["dense_ppl"] else "held_out"
    dense = report["dense_ppl"][text]
    rows = [["activation level", "inputs skipped", "perplexity", "change", "KL"]]
    for level in report["levels"]:
        figures = level["texts"][text]
        # over this model without a level; the report's own may be over the one before pruning
        change, kl = f"{figures['ppl'] / dense - 1:+.2%}", _number(figures["kl"], ".4f")
        ppl = f"{figures['ppl']:.4g}"
        rows.append([escape(level["name"]), f"{figures['sparsity']:.1%}", ppl, change, kl])
    source = (
        "another text" if text == "other" else "windows of the calibration text not seen before"
    )
    return [table(rows), f"Without a level {dense:.4g}; on {source}. Change: of the perplexity."]


def _frontier(report: dict[str, Any]) -> list[str]:
    """The fastest of a `frontier` run: the row that this checkpoint is."""
    if not report.get("rows"):
        return []
    best, dense = report["rows"][report["chosen"]], report["rows"][0]
    own, base = best["tokens_per_second"], dense["tokens_per_second"]
    config, environment = report["config"], report["environment"]
    return [
        f"The fastest of {len(report['rows'])} combinations within "
        f"{100 * config['max_ppl_increase']:g}% more perplexity, at level {escape(best['level'])}: "
        f"{own:.1f} tokens/s, the dense model {base:.1f}, behind {config['context']} tokens on "
        f"{escape(environment['device'])}; perplexity {best['ppl_increase']['held_out']:+.2%} on "
        "windows that nothing saw."
    ]


def _where(entry: dict[str, Any]) -> str:
    device = escape(str(entry.get("device", "an unknown device")))
    return f"{device}, {escape(str(entry.get('dtype', '')))}, {escape(str(entry.get('date', '')))}."


def _level_name(level: str) -> str:
    return "this model" if level == DENSE else f"at level {escape(level)}"


def _number(value: Any, form: str) -> str:
    """Empty for what is not known or was not finite."""
    return f"{value:{form}}" if isinstance(value, int | float) else ""


def _plus_minus(value: Any, stderr: Any, form: str) -> str:
    error = _number(stderr, form.removeprefix("+"))
    return f"{_number(value, form)}{' ± ' if error else ''}{error}"


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """The measured figures for the hub's model-index; what was not finite is left out."""
    results = []
    for entry in facts.measured:
        for row in entry["rows"] if entry["kind"] in ("text", "tasks") else []:
            results += _result(entry, row)
    return results


def _result(entry: dict[str, Any], row: dict[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    level = "" if row["level"] == DENSE else f", level {row['level']}"
    if entry["kind"] == "text":
        name, config = shown_text(entry["on"]), f"windows of {entry['seq_len']} tokens"
        kind, metric, value = "perplexity", "token perplexity", row["token_ppl"]
    else:
        name, config = row["task"], f"{row['num_fewshot']}-shot"
        kind, metric, value = row["metric"], row["metric"], row["value"]
    if value is None:
        return []
    return [
        EvalResult(
            task_type=TASK_TYPE,
            dataset_type=clean(name),
            dataset_name=clean(name),
            dataset_config=config,
            metric_type=clean(kind),
            metric_name=clean(metric + level),
            metric_value=value,
        )
    ]
