"""Decoding a 1B-shaped Llama of random weights with both sparsities, beside transformers.

    python eval/bench/bench_levels.py                   about ten minutes
    python eval/bench/bench_levels.py --work DIR        keeps the models there and uses them again

The model is bench_decode.py's. Thresholds are quantiles of what random tokens put into the linears,
the same sparsity at every site: speed depends on how many inputs are skipped, not on which. All
take turns, figures are medians. Then: what verifying several drafted tokens costs, and how many of
them must be right for a sparse draft to pay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_decode import make_model
from rich.console import Console
from rich.table import Table

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm.activation.levels import Level, LevelTable
from prune_llm.activation.measure import GatedModel
from prune_llm.decoder import PlanDecoder, new_decoder
from prune_llm.generation import load_tokenizer
from prune_llm_eval.decode_speed import time_plan, time_transformers
from prune_llm_kernels import cpu

MOST_ROWS = 6


def add_levels(model: Any, shares: list[float]) -> None:
    """Levels such as "50%" in the loaded model, the same sparsity at every site."""
    generator = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(model.config.vocab_size, (1, 256), generator=generator)
    gated = GatedModel.of(model, "magnitude")
    quantiles = gated.quantiles(ids_ST)
    levels = tuple(
        Level(f"{share:.0%}", tuple(quantiles.thresholds([share] * len(gated.sites))), share)
        for share in shares
    )
    table = LevelTable("magnitude", tuple(site.site for site in gated.sites), levels).to_json()
    settings = getattr(model.config, "quantization_config", None)
    if settings is None:
        model.config.quantization_config = {"activation": table}
    else:
        settings.settings["activation"] = table


def step_seconds(decoder: PlanDecoder, rows: int, level: str, context: int) -> float:
    """Median of one run with so many new tokens of the one sequence."""
    positions_B = context + torch.arange(rows)
    plan = decoder.record(positions_B, level).blocks.plan
    times = []
    for _ in range(12):
        start = time.perf_counter()
        plan.run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def drafting(decoder: PlanDecoder, level: str, context: int) -> list[dict[str, float]]:
    """For each number of drafted tokens: costs in dense steps, and the acceptance that pays."""
    found = []
    dense = step_seconds(decoder, 1, "dense", context)
    sparse = step_seconds(decoder, 1, level, context)
    for drafted in range(1, MOST_ROWS):
        verify = step_seconds(decoder, drafted + 1, "dense", context)
        cost = (drafted * sparse + verify) / dense
        rates = [rate / 1000 for rate in range(1001)]
        pays = [r for r in rates if sum(r**n for n in range(drafted + 1)) > cost]
        found.append(
            {
                "drafted": drafted,
                "draft_step": sparse / dense,
                "verify": verify / dense,
                "pays_from": min(pays, default=float("nan")),
            }
        )
    return found


def measure(
    packed: Path, dense: Path, options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float], list[dict[str, float]], float]:
    """Tokens/s of every round, share of active inputs, drafting, and GB/s."""
    shares = [percent / 100 for percent in options.levels]
    plain, both, skipping = (prune_llm.load(d) for d in (packed, packed, dense))
    reference = prune_llm.load(dense)
    for model in (both, skipping):
        add_levels(model, shares)
    tokenizer = load_tokenizer(plain)
    capacity = options.context + options.tokens + MOST_ROWS
    decoders = {"W50": new_decoder(plain, capacity)}
    for percent in options.levels:
        decoders[f"W50A{percent}"] = new_decoder(both, capacity, f"{percent}%")
    decoders[f"A{options.levels[-1]}"] = new_decoder(skipping, capacity, f"{options.levels[-1]}%")
    decoders["W50, channel-major"] = new_decoder(both, capacity)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(plain.config.vocab_size, (options.context,), generator=generator).tolist()
    runs: dict[str, Callable[[], float]] = {
        "transformers": lambda: time_transformers(reference, [ids], options.tokens)[1]
    }
    for name, decoder in decoders.items():
        runs[name] = lambda d=decoder: time_plan(d, ids, options.tokens, tokenizer)[1]  # type: ignore[misc]
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    buffer, reads = torch.ones(1 << 26, dtype=torch.int64), []
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            speed = run()
            speeds[name] += [speed] if round_ else []  # the first round warms up
            print(f"round {round_}: {name} {speed:.1f} tokens/s", flush=True)
        start = time.perf_counter()
        cpu.read_all(buffer)
        reads.append(buffer.nbytes / (time.perf_counter() - start) / 1e9)
    active = {name: d.statistics().active or 1.0 for name, d in decoders.items()}
    drafter = new_decoder(both, capacity)
    assert isinstance(drafter, PlanDecoder)
    drafter.prefill(ids)
    drafts = drafting(drafter, f"{options.levels[-1]}%", options.context)
    return speeds, active, drafts, statistics.median(reads)


def show(
    speeds: dict[str, list[float]], active: dict[str, float], drafts: list[dict[str, float]]
) -> None:
    console = Console(width=100)
    base = statistics.median(speeds["transformers"])
    table = Table("", "inputs active", "tokens/s", "over transformers")
    for name, values in speeds.items():
        middle = statistics.median(values)
        share = f"{active[name]:.0%}" if name in active else "-"
        table.add_row(name, share, f"{middle:.1f}", f"{middle / base:.2f}x")
    console.print(table)
    table = Table("drafted", "draft step", "verify", "pays from an acceptance of")
    for row in drafts:
        table.add_row(
            str(row["drafted"]),
            f"{row['draft_step']:.2f}",
            f"{row['verify']:.2f}",
            f"{row['pays_from']:.0%}" if row["pays_from"] == row["pays_from"] else "never",
        )
    console.print(table, "draft step, verify: in steps of the dense level")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--blocks", type=int, default=22)
    add("--levels", type=int, nargs="+", default=[40, 50], help="per cent of inputs skipped")
    add("--context", type=int, default=64)
    add("--tokens", type=int, default=64)
    add("--rounds", type=int, default=3)
    add("--work", type=Path, help="folder of the models; a temporary one if not given")
    add("--json", type=Path, help="also write the JSON line to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        dense = make_model(work / f"dense-{options.blocks}", options.blocks)
        packed = work / f"packed-{options.blocks}-0.5"
        if not packed.exists():
            prune(dense, PruneConfig(method="magnitude", pattern="0.5"), packed)
        speeds, active, drafts, bandwidth = measure(packed, dense, options)
    show(speeds, active, drafts)
    line = json.dumps(
        {
            "threads": torch.get_num_threads(),
            "context": options.context,
            "tokens_per_second": speeds,
            "active": active,
            "drafts": drafts,
            "read_gb_per_second": bandwidth,
        }
    )
    print(line)
    if options.json:
        options.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
