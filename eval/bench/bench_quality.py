"""What pruning costs in quality, over models and texts: methods in turns in one run.

    python eval/bench/bench_quality.py --model DIR/small --model DIR/large \
        --wiki wikitext2-test.txt --output OUT

Every model is pruned with every configuration, once on stories and once on WikiText, and each
result is scored on other stories and on other WikiText beside the dense model. The models are
`train_sizes.py`'s or others that know both texts. Rows go to OUT/rows.jsonl one by one; a run that
was stopped goes on where it was. Tables are OUT/tables.md, the figures OUT/quality.json.

Cost is CPU seconds of `prune` (user and system, the verification included), as a ratio to SparseGPT
on the same model, text and pattern in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from bench_prune import cpu_model
from train_sizes import articles

from prune_llm import PruneConfig, prune
from prune_llm.demo import text as stories
from prune_llm_eval.compare import EvalConfig, evaluate

Row = dict[str, Any]

DENSE_TARGET = {"target": "dense"}
BALANCED = {"method": "wanda", "target": "dense", "refine": "both"}
BASELINE = "sparsegpt"
# of each text: about twice what 96 windows of 256 tokens take; more would only be tokenized
STORIES, CHARACTERS = 260, 160_000
CONFIGS: dict[str, dict[str, str]] = {
    BASELINE: {},
    "wanda": {"method": "wanda"},
    "alps": {"method": "alps"},
    "wanda, dense target": {"method": "wanda", **DENSE_TARGET},
    "sparsegpt, dense target": DENSE_TARGET,
    "balanced": BALANCED,
    "balanced, owl": {**BALANCED, "allocation": "owl"},
    "balanced, error": {**BALANCED, "allocation": "error"},
    "sparsegpt, block": {**DENSE_TARGET, "reconstruction": "block"},
    "sparsegpt, logits": {**DENSE_TARGET, "reconstruction": "logits"},
    "balanced, block": {**BALANCED, "reconstruction": "block"},
    "balanced, logits": {**BALANCED, "reconstruction": "logits"},
    "balanced, error, block": {**BALANCED, "allocation": "error", "reconstruction": "block"},
    "balanced, error, logits": {**BALANCED, "allocation": "error", "reconstruction": "logits"},
}
# of the other patterns; allocations are for unstructured sparsity only
MAIN = (BASELINE, "alps", "balanced", "sparsegpt, logits")
# what names a row; the rest of it was measured
KEY = (
    "model",
    "calibration",
    "pattern",
    "config",
    "seed",
    "samples",
    "seq_len",
    "windows",
    "steps",
    "rate",
)


def _first(documents: list[str]) -> str:
    """Whole documents from the first on, until there is text enough."""
    ends = accumulate(len(document) for document in documents)
    return "".join(
        document
        for document, end in zip(documents, ends, strict=True)
        if end - len(document) < CHARACTERS
    )


def write_texts(wiki: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """Calibration and evaluation text of each domain: disjoint stories, disjoint articles."""
    found = articles(wiki.read_text(encoding="utf-8"))
    half = len(found) // 2
    texts = {
        "stories": (stories("calibration", STORIES), stories("held_out", STORIES)),
        "wiki": (_first(found[:half]), _first(found[half:])),
    }
    files: dict[str, dict[str, Path]] = {}
    for domain, parts in texts.items():
        files[domain] = {}
        for use, content in zip(("calibration", "evaluation"), parts, strict=True):
            files[domain][use] = folder / f"{domain}-{use}.txt"
            files[domain][use].write_text(content, encoding="utf-8")
    return files


def wanted(options: argparse.Namespace) -> Iterator[Row]:
    """The keys of all rows, in the order in which they are measured."""
    turns = product(options.pattern, options.seed, options.calibration, options.model)
    for pattern, seed, calibration, model in turns:
        for config in options.config or (CONFIGS if pattern == "0.5" else MAIN):
            chosen = {"model": model.name, "calibration": calibration, "pattern": pattern}
            common = {name: getattr(options, name) for name in KEY if hasattr(options, name)}
            yield {**common, **chosen, "config": config, "seed": seed}


def prune_config(row: Row, calibration: Path) -> PruneConfig:
    """Seed 0 takes the first windows of the text, any other draws them."""
    options: dict[str, Any] = dict(CONFIGS[row["config"]])
    if "reconstruction" in options:
        options["reconstruction_steps"] = row["steps"]
        options["reconstruction_rate"] = row["rate"]
    return PruneConfig(
        pattern=row["pattern"],
        calibration=str(calibration),
        samples=row["samples"],
        seq_len=row["seq_len"],
        sampling="random" if row["seed"] else "first",
        seed=row["seed"],
        device="cpu",
        dtype="float32",
        format="dense",
        **options,
    )


def cpu_seconds() -> float:
    """Of this process so far, in user and system mode."""
    spent = os.times()
    return spent.user + spent.system


def measure(row: Row, model: Path, files: dict[str, dict[str, Path]], output: Path) -> Row:
    """Prune once, score on every domain; the row with what was found."""
    shutil.rmtree(output, ignore_errors=True)
    config = prune_config(row, files[row["calibration"]]["calibration"])
    wall, cpu = time.perf_counter(), cpu_seconds()
    report = prune(model, config, output)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    found: Row = {"cpu_s": cpu, "wall_s": wall, "load": os.getloadavg()[0]}
    found["sparsity"], found["domains"] = report.sparsity, {}
    for domain, uses in files.items():
        scoring = EvalConfig(
            text=str(uses["evaluation"]),
            seq_len=row["seq_len"],
            windows=row["windows"],
            device="cpu",
            dtype="float32",
        )
        dense, pruned = evaluate(str(output), str(model), scoring, lambda *_: None)
        found["domains"][domain] = {
            "dense_token_ppl": dense.quality.token_ppl,
            "token_ppl": pruned.quality.token_ppl,
            "kl": pruned.quality.kl,
            "flips": pruned.quality.flips,
            "nll_stderr": pruned.quality.nll_stderr,
        }
    shutil.rmtree(output)
    return {**row, **found}


def read_rows(path: Path) -> list[Row]:
    """All rows measured so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


# ---------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def select(rows: list[Row], **fields: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def distinct(rows: list[Row], name: str) -> list[Any]:
    """Values of a field, in the order of their first row."""
    return list(dict.fromkeys(row[name] for row in rows))


def ratios(rows: list[Row], config: str, value: Any) -> list[float]:
    """``value(row)`` over that of SparseGPT's row with the same key otherwise."""
    base = {_setting(row): row for row in select(rows, config=BASELINE)}
    pairs = [(row, base.get(_setting(row))) for row in select(rows, config=config)]
    return [value(row) / value(other) for row, other in pairs if other is not None]


def _setting(row: Row) -> tuple[Any, ...]:
    """What SparseGPT's result depends on."""
    return tuple(row[name] for name in KEY if name not in ("config", "steps", "rate"))


def median(values: list[float], form: str) -> str:
    """The median; behind it the range where there are several values."""
    if not values:
        return "-"
    spread = f" ({min(values):{form}}-{max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{spread}"


def _cell(rows: list[Row], domain: str) -> str:
    scores = [row["domains"][domain] for row in rows]
    ppl, kl = ([score[name] for score in scores] for name in ("token_ppl", "kl"))
    return f"{median(ppl, '.2f')}, {median(kl, '.3f')}" if scores else "-"


def quality_table(rows: list[Row]) -> str:
    """token_ppl and KL of one model and pattern, by text calibrated on and text scored."""
    texts, domains = distinct(rows, "calibration"), list(rows[0]["domains"])
    columns = list(product(texts, domains))
    head = ["configuration", *(f"{text} -> {domain}" for text, domain in columns), "CPU s", "ratio"]
    dense = rows[0]["domains"]
    first = [f"{dense[domain]['dense_token_ppl']:.2f}" for _, domain in columns]
    lines = [["dense", *first, "", ""]]
    for config in distinct(rows, "config"):
        chosen = select(rows, config=config)
        cells = [_cell(select(chosen, calibration=text), domain) for text, domain in columns]
        seconds = median([row["cpu_s"] for row in chosen], ".0f")
        cost = median(ratios(rows, config, lambda row: row["cpu_s"]), ".1f")
        lines.append([config, *cells, seconds, cost])
    return table(head, lines)


def gain_table(rows: list[Row]) -> str:
    """KL as a share of SparseGPT's, one column for each model and text: same or other."""
    models = distinct(rows, "model")
    columns = list(product(models, (True, False)))
    names = {True: "same text", False: "other text"}
    lines = []
    for config in distinct(rows, "config"):
        cells = []
        for model, same in columns:
            some = select(rows, model=model)
            shares = [
                share
                for domain in some[0]["domains"]
                for text in distinct(some, "calibration")
                if (text == domain) == same
                for share in ratios(
                    select(some, calibration=text),
                    config,
                    lambda row, domain=domain: row["domains"][domain]["kl"],
                )
            ]
            cells.append(median(shares, ".2f"))
        lines.append([config, *cells])
    return table(["configuration", *(f"{m}, {names[same]}" for m, same in columns)], lines)


def label(row: Row) -> str:
    """The configuration, with the budget and rate of its reconstruction if it has one."""
    name: str = row["config"]
    trained = "reconstruction" in CONFIGS[name]
    return f"{name}, {row['steps']} steps at {row['rate']:g}" if trained else name


def tables(rows: list[Row]) -> str:
    """All of them, as markdown."""
    rows = [{**row, "config": label(row)} for row in rows]
    parts = []
    for pattern in distinct(rows, "pattern"):
        chosen = select(rows, pattern=pattern)
        parts.append(f"## {pattern}: KL as a share of SparseGPT's\n\n{gain_table(chosen)}")
        for model in distinct(chosen, "model"):
            parts.append(f"### {pattern}, {model}\n\n{quality_table(select(chosen, model=model))}")
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, help="directory; repeatable")
    add("--wiki", type=Path, required=True, help="WikiText that no model was trained on")
    add("--output", type=Path, required=True, help="folder of rows, tables and scratch files")
    add("--calibration", nargs="+", choices=("stories", "wiki"), default=["stories", "wiki"])
    add("--pattern", nargs="+", default=["0.5", "0.6", "2:4"])
    add("--config", nargs="+", choices=tuple(CONFIGS), help="all at 0.5, the main ones elsewhere")
    add("--seed", type=int, nargs="+", default=[0], help="0: the first windows; others draw")
    add("--samples", type=int, default=96)
    add("--seq-len", type=int, default=256)
    add("--windows", type=int, default=64, help="of each evaluation text")
    add("--steps", type=int, default=300, help="of reconstruction, a block")
    add("--rate", type=float, default=0.03, help="of reconstruction (0.03)")
    add("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the tables of all rows."""
    options = parse()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    files = write_texts(options.wiki, options.output)
    models = {model.name: model for model in options.model}
    path = options.output / "rows.jsonl"
    done = {key_of(row) for row in read_rows(path)}
    with tempfile.TemporaryDirectory(dir=options.output) as temporary:
        scratch = Path(temporary) / "pruned"
        # imports and first calls are nobody's cost
        prune(options.model[0], PruneConfig(method="magnitude", device="cpu"), scratch)
        for row in wanted(options):
            if key_of(row) in done:
                continue
            found = measure(row, models[row["model"]], files, scratch)
            with path.open("a", encoding="utf-8") as rows_file:
                rows_file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
    rows = read_rows(path)
    about = {"cpu": cpu_model(), "threads": options.threads, "torch": torch.__version__}
    document = json.dumps({**about, "rows": rows}, indent=1)
    (options.output / "quality.json").write_text(document + "\n", encoding="utf-8")
    (options.output / "tables.md").write_text(tables(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
