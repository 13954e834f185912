"""`prune-llm serve` under load, beside `transformers serve`: latency, throughput, right answers.

    python eval/bench/bench_serve.py DIR                       a checkpoint, packed or dense
    python eval/bench/bench_serve.py --make 1.1b --work WORK   random weights, 50 % pruned
    python eval/bench/bench_serve.py DIR --faults              what breaks, and what that leaves
    python eval/bench/bench_serve.py DIR --soak 30             memory over half an hour

Load: a closed loop (serve_client.py) keeps so many requests running for so many seconds. The
servers take turns, each level in a process of its own, so that memory is of that level and no
prompt has been seen before (one returns only when all have been asked). Greedy, answers of a fixed
length. Tokens are as the server's usage counts them. "Wrong" answers differ from what the same
server says when asked that prompt while nothing else runs. The peer serves the same weights in
dense form.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve_client import closed_loop, summary
from serve_faults import CASES, Stand, run_faults, soak
from serve_inputs import SHAPES, Prompts, default_text, dense_form, made_model
from serve_process import Kind, Scale, serving

# cache of as many tokens as ours takes for 32 sequences of 2048; its own choice would be most of
# the memory there is. Its attention mask has the tokens of a batch times those of the cache.
_PEER_CACHE = "--cb-block-size 32 --cb-num-blocks 2048 --cb-max-batch-tokens 512"
_WARM_PROMPTS = 4
_COUNTS = ("whole", "cut", "checked", "mismatches")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="directory of a checkpoint")
    add("--make", choices=sorted(SHAPES), help="make a model of random weights instead")
    add("--work", type=Path, help="keeps made and exported models; temporary if not given")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    add("--seconds", type=float, default=60, help="of a level in a round")
    add("--grace", type=float, default=60, help="for requests that still run then")
    add("--rounds", type=int, default=2)
    add("--tokens", type=int, default=64, help="of an answer")
    add("--lengths", type=int, nargs=2, default=[16, 256], help="shortest and longest prompt")
    add("--prompts", type=int, default=128, help="different ones")
    add("--checked", type=int, help="prompts asked alone; all if not given")
    add("--peers", nargs="*", choices=["continuous", "plain"], default=["continuous"])
    add("--peer-checked", type=int, default=8, help="prompts that peers are asked alone")
    add("--peer-options", default=_PEER_CACHE, help="of the continuous peer")
    add("--serve-options", default="", help="of prune-llm serve")
    add("--text", type=Path, help="prompts are pieces of it; the bundled stories if not given")
    add("--threads", type=int, help="of each server; its own choice if not given")
    add("--faults", nargs="*", choices=CASES, help="these instead of load, or all of them")
    add("--aborts", type=int, default=1000, help="clients that leave, of --faults")
    add("--soak", type=float, metavar="MINUTES", help="mixed load instead")
    add("--log", type=Path, help="what the servers print; thrown away if not given")
    add("--json", type=Path, help="also write everything as JSON to this file")
    options = parser.parse_args()
    if (options.model is None) == (options.make is None):
        parser.error("give a directory or --make, one of the two")
    return options


def kinds_of(model: Path, work: Path, options: argparse.Namespace) -> list[Kind]:
    ours = shlex.split(options.serve_options)
    if options.threads is not None:
        ours += ["--threads", str(options.threads)]
    found = [Kind("prune-llm", model, tuple(ours))]
    for peer in options.peers:
        flags = ("--continuous-batching", *shlex.split(options.peer_options))
        chosen = flags if peer == "continuous" else ()
        name = f"transformers, {peer}"
        found.append(Kind(name, dense_form(model, work).resolve(), chosen, peer=True))
    return found


def order(level: int, round_: int, prompts: int) -> Iterator[int]:
    """Every prompt once, then all again, ..., the same for every server."""
    chosen = random.Random(f"{level}/{round_}")
    while True:
        yield from chosen.sample(range(prompts), prompts)


async def measure(
    stand: Stand, level: int, round_: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One level of one server."""
    async with serving(stand.kind, stand.log, stand.threads) as server:
        for number in range(options.prompts, options.prompts + _WARM_PROMPTS):
            await stand.ask(server.target, number)
        with Scale(server.pid) as scale:
            load = await closed_loop(
                lambda number: stand.ask(server.target, number),
                order(level, round_, options.prompts),
                level,
                options.seconds,
                options.grace,
            )
    return {
        "server": stand.kind.name,
        "round": round_,
        **summary(load, stand.alone),
        "ready_seconds": server.ready_seconds,
        "peak_rss": scale.rss,
        "peak_pss": scale.pss,
    }


async def run_load(stands: list[Stand], options: argparse.Namespace) -> list[dict[str, Any]]:
    for stand in stands:
        wanted = options.peer_checked if stand.kind.peer else options.checked
        await stand.ask_alone(options.prompts if wanted is None else min(wanted, options.prompts))
        print(f"{stand.kind.name}: {len(stand.alone)} prompts asked alone", flush=True)
    ours = stands[0].alone
    for stand in stands[1:]:
        both = ours.keys() & stand.alone.keys()
        # the peer drops the space in front; other differences are roundings of near ties
        same = sum(ours[number].strip() == stand.alone[number].strip() for number in both)
        print(f"{stand.kind.name}: {same} of {len(both)} answers as ours", flush=True)
    found = []
    for round_ in range(options.rounds):
        for level in options.concurrency:
            for stand in stands:
                row = await measure(stand, level, round_, options)
                found.append(row)
                speed, errors = row["tokens_per_second"], row["errors"]
                print(f"{level} {stand.kind.name}: {speed:.1f} tokens/s {errors or ''}", flush=True)
    return found


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rounds of one server at one level: sums of counts, medians of the rest."""
    first = rows[0]
    numbers = [name for name, value in first.items() if isinstance(value, int | float)]
    found: dict[str, Any] = {n: statistics.median(row[n] for row in rows) for n in numbers}
    found |= {name: sum(row[name] for row in rows) for name in _COUNTS}
    found["failed"] = sum(sum(row["errors"].values()) for row in rows)
    return {"server": first["server"], "concurrency": first["concurrency"], **found}


def load_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; times in milliseconds."""
    lines = [
        "| at once | server | tokens/s | ours is | TTFT p50 | p95 | TPOT p50 | p95 | end p50 | p95 "
        "| whole | cut | failed | wrong | peak RSS | PSS | prefix | client |",
        "|" + "---|" * 18,
    ]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["concurrency"], row["server"]), []).append(row)
    merged = {key: together(group) for key, group in groups.items()}
    mine = rows[0]["server"]
    for (level, server), row in sorted(merged.items(), key=lambda item: item[0][0]):
        ratio = merged[level, mine]["tokens_per_second"] / (
            row["tokens_per_second"] or float("nan")
        )
        times = " | ".join(
            f"{row[f'{name}_{share}'] * 1000:.{digits}f}"
            for name, digits in (("ttft", 0), ("tpot", 1), ("e2e", 0))
            for share in ("p50", "p95")
        )
        lines.append(
            f"| {level} | {server} | {row['tokens_per_second']:.1f} | "
            f"{'' if server == mine else f'{ratio:.2f}x'} | {times} | {row['whole']} | "
            f"{row['cut']} | {row['failed']} | {row['mismatches']} of {row['checked']} | "
            f"{row['peak_rss'] / 1e9:.2f} GB | {row['peak_pss'] / 1e9:.2f} GB | "
            f"{_share(row.get('cached_share'))} | {row['client_cpu_share']:.0%} |"
        )
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "not told" if value is None else f"{value:.0%}"


def case_table(cases: dict[str, dict[str, Any]]) -> str:
    """Markdown: a line for each part of each case."""
    lines = ["| case | part | what |", "|---|---|---|"]
    for case, parts in cases.items():
        for part, value in parts.items():
            if part == "samples":
                continue
            lines.append(f"| {case} | {part.replace('_', ' ')} | {_told(value)} |")
    return "\n".join(lines)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        told = (f"{name.replace('_', ' ')} {_told(each)}" for name, each in value.items())
        return "; ".join(told) or "none"
    if isinstance(value, list):
        return " before, ".join(map(_told, value)) + " after"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


async def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    model = options.model or made_model(work, options.make)
    text = options.text.read_text() if options.text else None
    if text is None and options.make is None:
        text = default_text()
    prompts = Prompts(model, text, options.lengths)
    log = options.log or work / "servers.log"
    stands = [
        Stand(kind, prompts, options.tokens, 600.0, log, options.threads)
        for kind in kinds_of(model, work, options)
    ]
    if options.faults is not None or options.soak is not None:
        stand = stands[0]
        await stand.ask_alone(min(options.checked or 32, options.prompts))
        found: dict[str, Any] = {}
        if options.faults is not None:
            found |= await run_faults(
                stand,
                options.faults or CASES,
                abort_requests=options.aborts,
                load_seconds=options.seconds,
            )
        if options.soak is not None:
            async with serving(stand.kind, log, options.threads) as server:
                found["soak"] = await soak(server, stand, 16, options.soak * 60)
        print(case_table(found))
        return {"cases": found}
    rows = await run_load(stands, options)
    print(load_table(rows))
    return {"load": rows}


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version()}


def main() -> None:
    options = parse()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # ends its servers as well
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        try:
            found = asyncio.run(run(options, work))
        except KeyboardInterrupt:
            sys.exit("stopped; its servers are gone")
    found |= {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
