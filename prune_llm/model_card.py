"""The model card: README.md of a checkpoint, with the hub's metadata, made from its reports.

`card` is a pure function of `CardFacts`; `write_card` reads them and writes the file. Names of
models, texts and licences come from anywhere: in Markdown they are escaped, in YAML the hub's own
library writes them. What is written again later, figures and the name to load, stands in regions
between two comments; the rest of a card is its owner's to edit.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from prune_llm.card_facts import (
    CARD_FILE,
    FRONT_MATTER,
    TAG,
    CardFacts,
    parse_metadata,
    read_facts,
    shown_text,
)
from prune_llm.card_figures import cost_lines, eval_results
from prune_llm.card_markdown import clean, code, escape, fenced, size, table
from prune_llm.experts import without_index

# the hub knows finetune, adapter, merge and quantized: of these a smaller copy of the same model is
# the last one, whatever made it smaller
RELATION = "quantized"
Place = str | os.PathLike[str]


def write_card(directory: Path, source: Place, name: Place) -> None:
    """Write README.md into a finished checkpoint.

    Args:
        source: the directory that it was made from. name: the output's, before it has it.
    """
    facts = read_facts(directory, Path(source), Path(name).absolute().name)
    (directory / CARD_FILE).write_text(card(facts), encoding="utf-8")


def update_figures(directory: Path) -> None:
    """Put what was measured into the card, and leave everything else in it as it is.

    Raises:
        ValueError: the place for it was removed, or the metadata cannot be read.
    """
    file = directory / CARD_FILE
    if not file.is_file():
        write_card(directory, directory, directory)
        return
    text, known = _editable(file)
    facts = read_facts(directory, directory, directory.absolute().name)
    replaced = _replaced(text, "figures", _figures(facts))
    assert replaced is not None, "checked when it was read"
    front = FRONT_MATTER.match(replaced)
    body = replaced[front.end() :] if front else replaced
    file.write_text(f"---\n{_with_results(known, facts)}\n---\n{body}", encoding="utf-8")


def check_card(directory: Path) -> None:
    """Raises ValueError where a card cannot take figures any more; no card is fine."""
    file = directory / CARD_FILE
    if file.is_file():
        _editable(file)


def _editable(file: Path) -> tuple[str, dict[str, Any]]:
    """Text and metadata. ValueError where there is no place for figures in it."""
    from huggingface_hub import ModelCardData

    try:
        text = file.read_text(encoding="utf-8")
        known = parse_metadata(text)
        ModelCardData(**known)  # raises for a model-index that is none
    except ValueError as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}; mend it first") from None
    if _replaced(text, "figures", "") is None:
        begin, end = _marks("figures")
        raise ValueError(
            f"{file}: has no lines {begin!r} and {end!r} to put figures between; put them back, or "
            "move the file away for a new one"
        )
    return text, known


def published(directory: Path, name: str) -> str:
    """The card as it goes to the hub: it says how to load the model from there."""
    file = directory / CARD_FILE
    facts = read_facts(directory, directory, name)
    if not file.is_file():
        return card(facts)
    text = file.read_text(encoding="utf-8")
    return _replaced(text, "use", _use(facts)) or text


def card(facts: CardFacts) -> str:
    """The whole file."""
    sections = [
        f"# {escape(facts.name)}",
        _summary(facts),
        "## Use",
        _region("use", _use(facts)),
        "## What was done",
        *_done(facts),
        "## What it cost",
        _region("figures", _figures(facts)),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(facts)),
    ]
    return f"---\n{metadata(facts)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _marks(region: str) -> tuple[str, str]:
    return f"<!-- prune-llm:{region} -->", f"<!-- /prune-llm:{region} -->"


def _region(region: str, text: str) -> str:
    begin, end = _marks(region)
    return f"{begin}\n{text}\n{end}"


def _replaced(text: str, region: str, inside: str) -> str | None:
    """None where the region is not there, or more than once."""
    begin, end = map(re.escape, _marks(region))
    found = list(re.finditer(f"^{begin}$.*?^{end}$", text, re.DOTALL | re.MULTILINE))
    if len(found) != 1:
        return None
    return text[: found[0].start()] + _region(region, inside) + text[found[0].end() :]


def _figures(facts: CardFacts) -> str:
    return "\n\n".join(cost_lines(facts))


def _with_results(known: dict[str, Any], facts: CardFacts) -> str:
    """The metadata with our results in it; others' stay."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(**known)
    own = eval_results(facts)
    others = [
        result
        for result in data.eval_results or []
        if not any(result.is_equal_except_value(one) for one in own)
    ]
    data.eval_results = [*others, *own] or None
    data.model_name = (data.model_name or clean(facts.name)) if data.eval_results else None
    text: str = data.to_yaml()
    return text


def metadata(facts: CardFacts) -> str:
    """YAML as the hub reads it; what is not known is left out."""
    from huggingface_hub import ModelCardData

    base = facts.base
    licence = {key: clean(value) for key, value in base.licence.items()}
    results = eval_results(facts)
    data = ModelCardData(
        base_model=base.hub,
        language=[clean(language) for language in base.language] or None,
        # a name that the hub does not know shows no snippet: transformers' own would not load it
        library_name="transformers" if facts.form == "dense" else TAG,
        tags=_tags(facts),
        pipeline_tag="text-generation",
        model_name=clean(facts.name) if results else None,
        eval_results=results or None,
        base_model_relation=RELATION if base.hub else None,
        **licence,
    )
    text: str = data.to_yaml()
    return text


def _tags(facts: CardFacts) -> list[str]:
    config = facts.pruning.get("config", {})
    tags = [TAG, "sparse"]
    if facts.pruning:
        pattern = clean(str(config.get("pattern")))
        tags += ["pruned", clean(str(config.get("method")))]
        tags.append(pattern if ":" in pattern else "unstructured")
    if facts.levels:
        tags.append("activation-sparsity")
    return tags


def _summary(facts: CardFacts) -> str:
    base = escape(facts.base.name)
    if facts.base.hub:
        base = f"[{base}](https://huggingface.co/{facts.base.hub})"
    levels = "with levels of activation sparsity"
    what = levels if facts.levels else "in another form, its weights unchanged"
    if facts.pruning:
        also = f", {levels}" if facts.levels else ""
        what = f"pruned in one shot: {_sparsity(facts):.1%} of its linears' weights are zero{also}"
    stored = "the zeros are stored as zeros"
    if facts.form == "sparse":
        share = facts.nbytes / (facts.dense_nbytes or 1)
        stored = f"{share:.0%} of the {size(facts.dense_nbytes)} of the dense form"
    return f"{base}, {what}. {size(facts.nbytes)} on disk: {stored}."


def _use(facts: CardFacts) -> str:
    name = clean(facts.name)
    importing = "import prune_llm  # lets transformers read the packed weights\n"
    python = (
        f"{importing if facts.form == 'sparse' else ''}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})"
    )
    quoted, level = shlex.quote(name), ""
    if facts.levels.get("levels"):
        level = f" --level {shlex.quote(clean(str(facts.levels['levels'][0]['name'])))}"
    shell = (
        f"prune-llm generate {quoted} --prompt 'Once upon a time'{level}\n"
        f"prune-llm serve {quoted}  # OpenAI's API"
    )
    if facts.form == "sparse":
        shell += f"\nprune-llm export {quoted} -o dense --format dense  # loads anywhere"
    return fenced("python", python) + "\n\n" + fenced("sh", shell)


def _done(facts: CardFacts) -> list[str]:
    if not facts.pruning:
        return [
            "No report of a pruning run lies beside the weights; none of them was changed here."
        ]
    report = facts.pruning
    rows = [
        ["method", escape(_method(report.get("config", {})))],
        ["pattern", _pattern(str(report["config"].get("pattern")))],
        ["realised", f"{_sparsity(facts):.2%} of {_weights(report):,} weights in linears"],
        ["calibration", _calibration(report)],
        ["seed", escape(str(report["config"].get("seed")))],
        ["base weights", f"sha256 {code(str(report.get('model_sha256'))[:16])}"],
        ["versions", escape(_versions(report.get("environment", {})))],
        ["on disk", f"{size(report['bytes_before'])} before, {size(report['bytes_after'])} after"],
    ]
    error = "output error" if report.get("calibration") else ""
    kinds = [["linear", "n", "pruned", error, "before", "after"], *_kinds(report)]
    note = "output error: relative squared error on the calibration text, mean of the linears."
    told = [table([["", ""], *rows]), table(kinds)]
    return [*told, note] if error else told


def _method(config: dict[str, Any]) -> str:
    parts = [str(config.get("method"))]
    for name, usual in (
        ("target", "pruned"),
        ("refine", "none"),
        ("allocation", "uniform"),
        ("reconstruction", "none"),
    ):
        if config.get(name, usual) != usual:
            parts.append(f"{name} {config[name]}")
    return ", ".join(parts)


def _pattern(pattern: str) -> str:
    if ":" in pattern:
        kept, of = pattern.split(":", 1)
        return escape(f"{pattern} ({kept} of every {of} consecutive inputs kept)")
    return escape(f"{pattern} (share pruned, unstructured)")


def _calibration(report: dict[str, Any]) -> str:
    text = report.get("calibration")
    if not text:
        return "none"
    where = escape(shown_text(str(text["source"])))
    digest = code(str(text["sha256"])[:16])
    return f"{text['samples']} samples of {text['seq_len']} tokens of {where}, sha256 {digest}"


def _versions(environment: dict[str, Any]) -> str:
    names = ("prune-llm", "torch", "transformers")
    told = [f"{name} {environment[name]}" for name in names if name in environment]
    return ", ".join([*told, f"on {environment.get('device', 'an unknown device')}"])


def _weights(report: dict[str, Any]) -> int:
    return sum(int(entry["weights"]) for entry in report["linears"])


def _sparsity(facts: CardFacts) -> float:
    kept = sum(int(entry["kept"]) for entry in facts.pruning["linears"])
    return 1 - kept / (_weights(facts.pruning) or 1)


def _kinds(report: dict[str, Any]) -> list[list[str]]:
    grouped: dict[str, list[dict[str, Any]]] = {}
    for entry in report["linears"]:
        grouped.setdefault(without_index(str(entry["kind"])), []).append(entry)
    rows = []
    for kind, entries in grouped.items():
        pruned = 1 - sum(e["kept"] for e in entries) / sum(e["weights"] for e in entries)
        errors = [e["error"] for e in entries if e.get("error") is not None]
        error = f"{sum(errors) / len(errors):.4f}" if errors else ""
        before, after = (sum(e[f"bytes_{when}"] for e in entries) for when in ("before", "after"))
        rows.append(
            [code(kind), str(len(entries)), f"{pruned:.2%}", error, size(before), size(after)]
        )
    return rows


def _limits(facts: CardFacts) -> list[str]:
    if facts.form == "sparse":
        yours = "`export --format dense` writes plain zeros that do"
        lines = [
            "Loads only where prune_llm is installed: transformers alone finds no "
            f"`model.safetensors`, and other programs do not read the packed form; {yours}."
        ]
    else:
        lines = [
            "Zeros are stored as zeros: no smaller and no faster than the base model as it is."
        ]
    if facts.pruning.get("calibration"):
        lines.append(
            "Fitted to its calibration text; on other text it may have lost more. Measure on "
            "yours: `prune-llm eval`."
        )
    if facts.levels:
        lines.append("Activation levels need prune_llm; without one chosen nothing is skipped.")
    lines.append("Speed depends on the machine, the batch and the context: `prune-llm bench`.")
    if facts.base.hub:
        there = f"[base model's card](https://huggingface.co/{facts.base.hub})"
        lines.append(f"Licence, intended use, training data and biases: see the {there}.")
    else:
        licence = " and licence" if not facts.base.licence else ""
        lines.append(f"Intended use, training data, biases{licence} are those of the base model.")
    return [re.sub(r"\s+", " ", line) for line in lines]
