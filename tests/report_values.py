"""A report.json made by hand: two blocks, one level, three loads, one task, one passage."""

from __future__ import annotations

from typing import Any

from prune_llm_eval.report.gathering import missing, warnings
from prune_llm_eval.report.speed_section import gain, spread
from prune_llm_eval.report.verdict import decide

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LOADS = ((16, 1), (16, 8), (256, 1))
VARIANTS = ("dense", "model", "level 40%", "transformers")
# seconds of a step by variant and round, at the first load
STEPS = {
    "dense": (0.010, 0.011, 0.012),
    "model": (0.005, 0.005, 0.006),
    "level 40%": (0.012, 0.014, 0.013),
    "transformers": (0.040, 0.050, 0.045),
}
EVIL = "<script>alert('x')</script>\"&|*_`[a](http://evil) \x1b[31m"


def report_values() -> dict[str, Any]:
    """The whole, as `gather` makes it."""
    report: dict[str, Any] = {
        "schema": "prune_llm.report",
        "schema_version": 1,
        "model": about("small-50", ["40%"]),
        "against": {**about("small", []), "sha256": "d" * 64},
        "target": 0.05,
        "sparsity": {"linears": linears()},
        "size": [
            {"role": "dense", "disk": 2000, "memory": {"weights": 2000, "process": 9000}},
            {"role": "model", "disk": 1200, "memory": {"weights": 1210, "process": 8000}},
        ],
        "quality": quality(),
        "tasks": tasks(),
        "speed": speed(),
        "beside": [{"source": "comparison.json", "points": beside()}],
        "provenance": {
            "command": "prune-llm report small-50 --against small",
            "date": "2026-11-28 12:00",
            "seconds": 61.5,
            "environment": {"torch": "2.13.0", "device": "a processor"},
            "pruning": {
                "model": "small",
                "model_sha256": "d" * 64,
                "config": {"method": "wanda", "pattern": "0.5", "target": "dense"},
                "calibration": {
                    "source": "calibration.txt", "samples": 8, "seq_len": 32, "sha256": "c" * 64,
                },
                "seconds": 4.0,
                "warnings": [],
            },
            "activation": None,
        },
    }  # fmt: skip
    return completed(report)


def completed(report: dict[str, Any]) -> dict[str, Any]:
    """With what follows from the rest."""
    report["missing"], report["warnings"] = missing(report), warnings(report)
    report["verdict"] = decide(report)
    return report


def about(name: str, levels: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "given": name,
        "architecture": "LlamaForCausalLM",
        "form": "sparse",
        "pattern": "0.5",
        "levels": levels,
        "sites": {
            f"model.layers.{block}.{site}": [f"model.layers.{block}.{site}"]
            for block in (0, 1)
            for site in ("self_attn.q_proj", "mlp.down_proj")
        },
        "weights": 12345,
        "stored_as": ["BF16"],
        "context": 512,
        "sha256": "a" * 64,
    }


def linears() -> list[dict[str, Any]]:
    return [
        {
            "block": block,
            "kind": kind,
            "weights": 100 * (place + 1),
            "sparsity": 0.4 + 0.1 * place,
            "asked": 0.4 + 0.1 * place,
            "pattern": "0.5",
            "error": 0.01 * (1 + place + 3 * block),
        }
        for block in (0, 1)
        for place, kind in enumerate(KINDS)
    ]


def quality() -> dict[str, Any]:
    return {
        "text": {
            "source": "held_out.txt",
            "tokens": 5100,
            "windows": 40,
            "seq_len": 128,
            "protocol": "all-sparse",
            "sha256": "b" * 64,
        },
        "rows": [
            quality_row("dense", None, 4.0, None),
            quality_row("model", None, 4.1, 0.025),
            quality_row("level", "40%", 4.6, 0.15),
        ],
    }


def quality_row(role: str, level: str | None, ppl: float, increase: float | None) -> dict[str, Any]:
    sites = {f"model.layers.{b}.{s}": 0.3 + 0.1 * b for b in (0, 1) for s in ("mlp.down_proj",)}
    return {
        "role": role,
        "level": level,
        "token_ppl": ppl,
        "nll": 1.4,
        "nll_stderr": 0.02,
        "tokens": 5100,
        "windows": 40,
        "seq_len": 128,
        "kl": None if increase is None else increase * 1.1,
        "flips": None if increase is None else 2 * increase,
        "zeros": 0.0 if role == "dense" else 0.5,
        "skipped": 0.41 if level else None,
        "site_sparsity": sites if level else {},
        "ppl_increase": increase,
        "forgotten": None if increase is None else forgotten(increase),
    }


def forgotten(increase: float) -> dict[str, Any]:
    harm = {"tokens": 5100, "kl": increase * 1.1, "flips": 2 * increase, "nll_increase": increase}
    return {
        **harm,
        "nll_increase_stderr": 0.004,
        "lost": 0.021,
        "gained": 0.012,
        "kl_median": 0.002,
        "kl_of_worst_percent": 0.37,
        "nll_of_worse": 0.05,
        "nll_of_better": -0.02,
        "clearly_worse": 0.011,
        "clearly_better": 0.003,
        "by_position": [{**harm, "low": 1, "high": 1}, {**harm, "low": 2, "high": 3}],
        "by_frequency": [{**harm, "low": 10, "high": 99}],
        "hurt": [{**harm, "token": 7, "text": " sea"}],
        "passages": [passage()],
    }


def passage() -> dict[str, Any]:
    """Four tokens of which one is flipped, one more inside a character."""
    return {
        "tokens": 5,
        "kl": 0.8,
        "flips": 0.4,
        "nll_increase": 0.5,
        "window": 3,
        "start": 33,
        "before": "Once upon",
        "text": " a time\n in é",
        "pieces": [
            piece(" a", 0.01, False),
            piece(" time", 1.5, True),
            piece("\n", 0.2, False),
            piece("", 0.9, True),
            piece(" in é", 0.1, False),
        ],
    }


def piece(text: str, kl: float, flipped: bool) -> dict[str, Any]:
    return {
        "token": 5,
        "text": text,
        "kl": kl,
        "flipped": flipped,
        "probability": 0.25,
        "dense_probability": 0.75,
        "choice": {"token": 6, "text": " boat", "probability": 0.6},
        "dense_choice": {"token": 5, "text": text, "probability": 0.8},
    }


def tasks() -> dict[str, Any]:
    row = {
        "task": "next_word",
        "metric": "acc",
        "filter": "none",
        "value": 0.71,
        "stderr": 0.02,
        "documents": 200,
        "num_fewshot": 2,
        "higher_is_better": True,
    }
    paired = {
        "difference": -0.035, "stderr": 0.01, "changed": 13, "better": 3, "significant": True,
    }  # fmt: skip
    return {
        "rows": [
            {**row, "model": "dense", "value": 0.745, "paired": None},
            {**row, "model": "model", "paired": paired},
            {**row, "model": "level 40%", "stderr": None, "paired": {**paired, "stderr": None,
             "significant": None}},
        ],
        "config": {"tasks": ["next_word"]},
        "skipped": {"level 40%": 0.4},
        "notes": ["only the first 200 documents of each task: no figure to publish"],
        "lm_eval": "0.4.13",
    }  # fmt: skip


def speed() -> dict[str, Any]:
    return {
        "cpu": "a processor",
        "instructions": "avx2",
        "threads": 2,
        "load_average": 1.9,
        "cores": 2,
        "thread_pool": "openmp",
        "dtype": "bfloat16",
        "date": "2026-11-28",
        "baseline": "the dense model",
        "packed_linears": 6,
        "config": {"contexts": [16, 256], "batches": [1, 8], "tokens": 32, "rounds": 3},
        "engines": {name: "prune_llm kernels" for name in VARIANTS},
        "loads": [load(context, batch) for context, batch in LOADS],
    }


def load(context: int, batch: int) -> dict[str, Any]:
    """At batch 8 the model is as fast as the dense one, give or take."""
    steps = dict(STEPS)
    if batch == 8:
        steps["model"] = (0.011, 0.010, 0.012)
    rows = [timing(name, context, batch, steps) for name in VARIANTS]
    bandwidth = spread([20e9, 21e9, 22e9])
    return {"context": context, "batch": batch, "bandwidth": bandwidth, "rows": rows}


def timing(
    name: str, context: int, batch: int, steps: dict[str, tuple[float, ...]]
) -> dict[str, Any]:
    step = steps[name]
    known = name in ("dense", "model")
    nbytes = {"dense": 200_000_000, "model": 120_000_000}.get(name)
    return {
        "variant": name,
        "ttft": spread([10 * s for s in step]),
        "tpot": spread(step),
        "prompt_tokens_per_second": spread([batch * context / (10 * s) for s in step]),
        "decode_tokens_per_second": spread([batch / s for s in step]),
        "active": 0.6 if name.startswith("level") else None,
        "bytes_per_step": nbytes,
        "bytes_per_token": None if nbytes is None else nbytes / batch,
        "cached": False if known else None,
        "bandwidth_share": spread([0.8, 0.85, 0.9]) if known else None,
        "decode_gain": None if name == "dense" else gain(steps["dense"], step),
        "prompt_gain": None if name == "dense" else gain(steps["dense"], step),
        "transformers_gain": None
        if name == "transformers"
        else gain(steps["transformers"], step),
        "transformers_prompt_gain": None
        if name == "transformers"
        else gain((0.05, 0.05, 0.05) if batch == 8 else steps["transformers"], step),
    }  # fmt: skip


def beside() -> list[dict[str, Any]]:
    """A line of one method, an N:M, and one that is broken."""
    rows = [
        ("wanda 0.3", "wanda", 0.3, 1.01),
        ("wanda 0.6", "wanda", 0.6, 1.3),
        ("wanda 2:4", "wanda N:M", 0.5, 1.2),
        ("wanda 0.9", "wanda", 0.9, None),
    ]
    return [
        {
            "label": label,
            "series": series,
            "weight_sparsity": sparsity,
            "input_sparsity": 0.0,
            "ppl_ratio": ratio,
            "speed_ratio": None,
        }
        for label, series, sparsity, ratio in rows
    ]
