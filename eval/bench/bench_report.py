"""The committed reports: of the bundled model and, where it is given, of the reference model.

    python eval/bench/bench_report.py -o eval/reports --reference shared/reference

Each model is compared over methods, pruned to 50 % with two activation levels, and reported beside
the dense one, by the commands that anyone types. The work happens in a temporary directory under
short names, so that no path of the machine gets into a report. About five minutes on two quiet
cores; timings mean nothing on a busy machine.
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
SEPARATED = ("--separator", "<|story|>")


def run(place: Path, *words: str) -> None:
    """One command of prune-llm, in a directory."""
    print("prune-llm", *words, file=sys.stderr)
    subprocess.run([sys.executable, "-m", "prune_llm", *words], cwd=place, check=True)


def make(
    place: Path, model: str, calibration: tuple[str, ...], text: tuple[str, ...], windows: int
) -> Path:
    """Compare, prune and report a model; the directory of the report."""
    pruned, report = f"{model}-50", f"{model}-report"
    scored = (*text, "--windows", str(windows))
    # the separator of compare is of both texts
    shared = tuple(word for word in text if word not in SEPARATED)
    run(place, "compare", model, "-o", "compared", *COMPARED, *calibration, *shared,
        "--windows", str(windows))  # fmt: skip
    run(place, "prune", model, "-o", pruned, "--sparsity", "0.5", *calibration, *LEVELS)
    run(place, "report", pruned, "--against", model, "-o", report, *scored, *SPEED,
        "--passages", "4", "--max-ppl-increase", "5%", "--beside", "compared/comparison.json",
    )  # fmt: skip
    shutil.rmtree(place / "compared")
    return place / report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/reports"))
    parser.add_argument("--reference", type=Path, help="directory with stories260k/ and text/")
    parser.add_argument("--machine", default="epyc", help="short name of the processor")
    parser.add_argument("--windows", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "bundled").symlink_to(model_path())
        made = {"bundled": make(place, "bundled", ("--samples", "32"), (), options.windows)}
        if options.reference is not None:
            reference = options.reference.resolve()
            (place / "stories260K").symlink_to(reference / "stories260k")
            for text in ("stories_calib.txt", "stories_eval.txt"):
                (place / text).symlink_to(reference / "text" / text)
            calibration = ("--calibration", "stories_calib.txt", *SEPARATED, "--samples", "96")
            calibration += ("--seq-len", "512", "--sampling", "first")
            text = ("--text", "stories_eval.txt", *SEPARATED)
            made["stories260K"] = make(place, "stories260K", calibration, text, options.windows)
        for name, report in made.items():
            target = options.output / f"{name}_{options.machine}_{time.strftime('%Y-%m-%d')}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(report, target)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
