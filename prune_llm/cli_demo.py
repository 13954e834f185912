"""`prune-llm demo`: the whole job on the bundled model, in four ways."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console

from prune_llm.cli_tables import print_prune_report, print_quality
from prune_llm.config import PruneConfig
from prune_llm.demo import model_path
from prune_llm.prune import prune

SPARSITY = "0.5"
CONFIGS = {
    **{
        method: PruneConfig(method=method, pattern=SPARSITY)
        for method in ("magnitude", "wanda", "sparsegpt")
    },
    "balanced": PruneConfig.of_quality("balanced", pattern=SPARSITY),
}
PROMPT_SEED = 1
STORY_TOKENS = 300


def run_demo(console: Console, output: Path) -> None:
    """Prune in four ways, verify, compare on held-out stories, tell a story each."""
    from prune_llm.cli import eval_bar
    from prune_llm_eval.compare import EvalConfig, evaluate_all

    dense = model_path()
    console.rule(f"pruning the bundled model to {SPARSITY} sparsity")
    models = [dense]
    for name, config in CONFIGS.items():
        models.append(_prune(console, dense, output / name, config))
    console.rule("what it cost, on held-out stories")
    with eval_bar() as show:
        rows = evaluate_all([str(model) for model in models], EvalConfig(windows=100), show)
    print_quality(console, rows)
    console.rule("the same beginning, continued")
    for model in (dense, models[-1]):
        console.print(f"[bold]{'dense' if model == dense else model.name}[/]: {tell(model)}\n")
    _next_steps(console, dense)


def _prune(console: Console, dense: Path, output: Path, config: PruneConfig) -> Path:
    from prune_llm.cli import progress_bar

    if output.is_dir():
        _check_ours(output)
        shutil.rmtree(output)
    with progress_bar() as show:
        report = prune(dense, config, output, show)
    print_prune_report(console, report)
    return output


def _check_ours(directory: Path) -> None:
    """The demo replaces its own earlier results and nothing else."""
    if not (directory / "prune_report.json").is_file():
        raise ValueError(f"output {str(directory)!r}: exists and is not a pruned model; remove it")


def tell(model: Path) -> str:
    """Continue the first words of a held-out story greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prune_llm.demo import stories

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    beginning = " ".join(stories("held_out", 1, PROMPT_SEED)[0].split()[:12])
    ids = tokenizer(beginning, return_tensors="pt").input_ids
    with torch.inference_mode():
        told = network.generate(ids, max_new_tokens=STORY_TOKENS, do_sample=False)
    return str(tokenizer.decode(told[0], skip_special_tokens=True)).strip()


def _next_steps(console: Console, dense: Path) -> None:
    console.rule("what to try next")
    console.print(
        f"The bundled model is [bold]{dense}[/]. For a model of your own:\n"
        "  prune-llm prune MODEL -o OUT --sparsity 0.5 --calibration your_text.txt\n"
        "  prune-llm eval OUT --against MODEL --text other_text.txt\n"
        "  prune-llm generate OUT --prompt 'Once upon a time'\n"
        "  prune-llm prune MODEL -o OUT --pattern 2:4      # hardware-friendly groups\n"
        "  prune-llm prune --help",
        soft_wrap=True,
    )
