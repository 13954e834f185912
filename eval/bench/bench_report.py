"""The committed reports: of the bundled model and of the reference model.

    python eval/bench/bench_report.py bundled
    python eval/bench/bench_report.py stories260K --reference shared/reference

A model is compared over methods, pruned to 50 % with two activation levels, and reported beside the
dense one, by the commands that anyone types. The work happens in a temporary directory under short
names, so that no path of the machine gets into a report. Ten minutes or so on two quiet cores, most
of it for the comparison (`--no-compare`); timings mean nothing on a busy machine.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prune_llm.demo import model_path

LEVELS = ("--activation-sparsity", "25%,40%", "--activation-allocation", "uniform")
COMPARED = ("--methods", "wanda,sparsegpt", "--patterns", "0.3,0.4,0.5,0.6,2:4")
SPEED = ("--context", "16", "--context", "128", "--context", "448")
SEPARATOR = ("--separator", "<|story|>")
# what each is calibrated on, and scored on
TEXTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bundled": (("--samples", "32"), ()),
    "stories260K": (
        ("--calibration", "stories_calib.txt", *SEPARATOR, "--samples", "96", "--seq-len", "512",
         "--sampling", "first"),
        ("--text", "stories_eval.txt"),
    ),
}  # fmt: skip


def prepare(place: Path, model: str, reference: Path | None) -> None:
    """The model and its texts under short names."""
    if model == "bundled":
        (place / model).symlink_to(model_path())
        return
    if reference is None:
        raise SystemExit(f"{model}: give --reference, a directory with stories260k/ and text/")
    (place / model).symlink_to(reference.resolve() / "stories260k")
    for text in (reference.resolve() / "text").glob("stories_*.txt"):
        (place / text.name).symlink_to(text)


def make(place: Path, model: str, windows: int, compare: bool) -> Path:
    """Compare, prune and report a model; the directory of the report."""
    calibration, text = TEXTS[model]
    scored = (*text, "--windows", str(windows))
    pruned, report, beside = f"{model}-50", "report", ()
    if compare:
        run(place, "compare", model, "-o", "compared", *COMPARED, *calibration, *scored)
        beside = ("--beside", "compared/comparison.json")
    run(place, "prune", model, "-o", pruned, "--sparsity", "0.5", *calibration, *LEVELS)
    separator = SEPARATOR if text else ()
    run(place, "report", pruned, "--against", model, "-o", report, *scored, *separator, *SPEED,
        "--passages", "4", "--max-ppl-increase", "5%", *beside)  # fmt: skip
    return place / report


def run(place: Path, *words: str) -> None:
    """One command of prune-llm, in a directory."""
    print("prune-llm", *words, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "prune_llm", *words], cwd=place, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(TEXTS))
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/reports"))
    parser.add_argument("--reference", type=Path, help="directory with stories260k/ and text/")
    parser.add_argument("--machine", default="epyc", help="short name of the processor")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--no-compare", action="store_true", help="no other models beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), options.model, options.reference)
        made = make(Path(directory), options.model, options.windows, not options.no_compare)
        name = f"{options.model}_{options.machine}_{time.strftime('%Y-%m-%d')}"
        shutil.rmtree(options.output / name, ignore_errors=True)
        shutil.copytree(made, options.output / name)
    print(f"wrote {options.output / name}")


if __name__ == "__main__":
    main()
