"""The words of the predicted report: what is assumed and from where, what follows, what to try."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
WIDTH = 100


def paragraph(text: str, first: str = "") -> str:
    """Filled to the width; ``first`` is a list's mark, under which the others are indented."""
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def opening(result: Row) -> Iterator[str]:
    yield "# Decoding on an H200: predicted, nothing measured (2026-11-29)"
    yield ""
    yield paragraph(
        f"""There was no GPU. This page is arithmetic, written by `{result["command"]}` (the same
        figures as JSON beside it); `make bench-gpu` measures the same cases. Llama-3-8B's shapes,
        bfloat16, batch 1 where nothing else is said. **[E]** is an estimate, [S] a source that was
        read, [C] counted in what the code makes, [R] recalled and not verified; "notes" are the
        project's notes on GPU kernels."""
    )
    yield ""
    yield from _verdict(result)
    yield ""
    yield "## What it rests on"
    yield ""
    yield from _quantities(result)
    yield ""
    yield from _counted(result)
    yield ""


def _verdict(result: Row) -> Iterator[str]:
    steps = {row["case"]: row for row in result["steps"] if row["context"] == 256}
    yield "| asked | kernels: predicted (asked) | end to end, context 256: predicted (asked) |"
    yield "|---|---|---|"
    for row in result["blocks"]:
        step = steps[row["case"]] if row["rows"] == 1 else None
        name = row["case"] if step else f"{row['case']}, batch {row['rows']}"
        yield f"| {name} | {_against(row)} | {_against(step) if step else ''} |"
    yield ""
    met = [
        f"{r['case']} {r['shape']}" + ("" if r["rows"] == 1 else f" batch {r['rows']}")
        for r in result["products"]
        if r["met"]
    ]
    yield paragraph(
        f"""Kernels: the four products of a block together, each with its own launches. Single
        products that reach what is asked: {", ".join(met) or "none"}. End to end: over a compiled
        dense step. **As the kernels are, the targets are predicted to be missed.**"""
    )


def _against(row: Row) -> str:
    return f"{row['speedup']:.2f}x ({row['target']}){'' if row['met'] else ', missed'}"


def _quantities(result: Row) -> Iterator[str]:
    device, reached = result["device"], result["reached"]

    def share(name: str) -> str:
        likely, low, high = (reached[which][name] for which in ("likely", "low", "high"))
        return f"{likely} ({min(low, high)} to {max(low, high)})"

    rows = [
        ("read bandwidth",
         f"{device['bandwidth'] / 1e12} TB/s of {device['peak'] / 1e12} on the sheet",
         "notes, section 4 [S]"),
        ("instructions",
         f"{device['issue']} threads' a clock, {device['multiprocessors']} multiprocessors, "
         f"{device['clock'] / 1e9} GHz", "notes, section 4 [S]"),
        ("cuBLAS reaches of the bandwidth", share("dense"), "[E] notes, sections 8 and 11"),
        ("our kernels reach of it", share("memory"),
         "[E] notes, section 1: MACKO 0.72 to 0.86 of its bytes"),
        ("and of the instructions", share("issue"),
         "[E] kernels/README.md: 0.80 to 0.90 of such bounds"),
        ("gap between two nodes of a graph", f"{device['gap'] * 1e6:.1f} us",
         "[S] Hazy Research, on an H100; notes, section 8"),
        ("a kernel that reads hardly anything", f"{device['small'] * 1e6:.1f} us",
         "[E] with its gap 2 us: notes, section 8"),
        ("a read from memory, from the second cache",
         f"{device['memory'] * 1e6:.2f}, {device['cache'] * 1e6:.2f} us",
         "[R] H100 micro-benchmarks"),
        ("second cache", f"{device['cache_bandwidth'] / 1e12} TB/s", "[R]"),
        ("attention reaches of the bandwidth", f"{result['attention']}", "[E]"),
        ("launches of a compiled dense block", f"{result['compiled']}, and two for the head",
         "[E] four products, two norms, rotation, two of attention, SwiGLU, one more"),
    ]  # fmt: skip
    yield "| quantity | value | source |"
    yield "|---|---|---|"
    yield from (f"| {name} | {value} | {source} |" for name, value, source in rows)


def _counted(result: Row) -> Iterator[str]:
    launches = {(r["weights"], r["thresholds"]): r["block"] for r in result["launches"]}
    rows = {(r["case"], r["rows"], r["shape"]): r for r in result["products"]}
    more = (
        rows["W50A50, Wanda masks", 1, "gate+up"]["moved_bytes"]
        / rows["W50A50", 1, "gate+up"]["moved_bytes"]
    )
    yield paragraph(
        f"""**Bytes** [C]: one block of 512 outputs of every shape is really packed, and the
        segments of the channels that count are added up, in pieces of 64 bytes as memory hands them
        over, with their starts. Masks are random, or Wanda's for inputs whose norms are log-normal
        with sigma 0.5; then channels that count hold more weights, and 50 % of both moves
        {more:.2f} times the bytes.""",
        "- ",
    )
    yield paragraph(
        """**Instructions** [C]: of the inner loop for each weight position, kept or not, in sm_90
        machine code: the CUDA kernel for 1, 2 and 4 rows, Triton's for 8 rows and for dense
        columns. Reads of shared memory (1.21 words each at 50 %, 1.00 at 70 %: notes, section 4)
        and shuffles are counted as well; they never bind.""",
        "- ",
    )
    yield paragraph(
        """**Balance** [C]: mean over most of the chunks that a multiprocessor reads, with the
        splits that gpu.py launches.""",
        "- ",
    )
    yield paragraph(
        f"""**Launches** [C] of a block, counted in plans: {launches["dense", False]} with dense
        weights, {launches["packed", False]} with packed ones, {launches["packed", True]} with
        thresholds.""",
        "- ",
    )
    yield paragraph(
        """**Time of a product** = the slowest of bytes, instructions and shared memory, each at its
        share; and reads that wait for each other (dense: one from memory; packed: starts, then
        segments; listed: two more from the second cache); the kernel that adds the splits, eight
        waiting reads at a time; the list; a gap before each. cuBLAS: bytes, one read, one gap.""",
        "- ",
    )
    yield "- **Ceiling**: everything at its limit, and no time for anything else."
    yield paragraph(
        """In brackets: our shares low with cuBLAS's high, and the reverse.""",
        "- ",
    )


def closing(result: Row) -> Iterator[str]:
    yield paragraph(
        """Our plan with dense weights spends launches on copies that a compiled step does not need;
        a speed-up over it flatters, so targets are held against the compiled step. Sampling is in
        neither."""
    )
    yield ""
    yield "## Why, and what to try next"
    yield ""
    for number, text in enumerate(_reasons(result), 1):
        yield paragraph(text, f"{number}. ")
    yield ""
    yield "Each change on top of those before [E]; dense stays as it is:"
    yield ""
    yield "| case | change | kernels | end to end, context 256 |"
    yield "|---|---|---|---|"
    for row in result["next"]:
        yield f"| {row['case']} | {row['change']} | {row['kernels']:.2f}x | {row['step']:.2f}x |"
    yield ""
    yield "Batches with the tensor core kernel that the notes designed and the best grids [E]:"
    yield ""
    yield "| case | batch | instructions a position | kernels |"
    yield "|---|---|---|---|"
    for row in result["batches"]:
        yield f"| {row['case']} | {row['rows']} | {row['instructions']} | {row['kernels']:.2f}x |"
    yield ""
    yield paragraph(
        """To be measured first, because everything hangs on it: what cuBLAS reaches at batch 1, the
        gap between nodes on the driver at hand, and whether the CUDA kernel issues at 0.85 with 12
        to 16 warps on a multiprocessor. `make bench-gpu` gives the first as the share of dense
        products, the third as the time of W70."""
    )


def _reasons(result: Row) -> Iterator[str]:
    rows = {(r["case"], r["rows"], r["shape"]): r for r in result["products"]}
    half, most = rows["W50", 1, "gate+up"], rows["W70", 1, "gate+up"]
    small, skipped = rows["W50", 1, "o"], rows["A50", 1, "o"]
    two, four, eight = (rows["W50", count, "gate+up"] for count in (2, 4, 8))
    wanda, down = rows["W50A50, Wanda masks", 1, "gate+up"], rows["W50A50", 1, "down"]
    listed = most["ceiling"] * most["instructions"] / wanda["instructions"]
    programs, device = half["splits"] * 56, result["device"]
    yield f"""**Small products are launches.** o_proj takes {small["dense_us"]:.1f} us dense and
        {small["us"]:.1f} us packed, of which two gaps are {2e6 * device["gap"]:.1f} us and adding
        {small["splits"]} splits {small["finish_us"]:.1f} us; {skipped["us"]:.1f} us with a list.
        The calibration at load decides. Next: let the program that ends last add the splits, write
        lists in the kernel before (norm, attention's last, as SwiGLU's does now), start kernels
        before the last has ended (programmatic dependent launch). None of it can be shown to be
        right without a GPU: an interpreter runs one program after the other."""
    yield f"""**Grids are even**: gate+up launches {programs} programs on
        {device["multiprocessors"]} multiprocessors (balance {half["balance"]:.2f}), chosen by what
        the busiest reads and what adding the splits costs. The best grid for each shape, below, is
        hardly faster."""
    yield f"""**70 % of the weights** is bound by instructions: a position costs
        {most["instructions"]:.1f}, kept or not. gate+up moves {most["moved_bytes"] / 1e6:.0f} MB
        and is {most["speedup"]:.2f}x as fast as cuBLAS, where 50 % is {half["speedup"]:.2f}x; at
        most {most["ceiling"]:.2f}x, {listed:.2f}x with a list. More needs a loop of about 6
        instructions. Next: running counts stored in the segment instead of two shuffles and a
        population count for every nibble; blocks of 1024 outputs."""
    yield f"""**Both at 50 %**, Wanda's masks: {wanda["speedup"]:.2f}x for gate+up
        ({wanda["low"]:.2f} to {wanda["high"]:.2f}); with random ones {down["speedup"]:.2f}x for
        down. The rest is launches, see 1. Memory alone would allow {wanda["ceiling"]:.2f}x, so 2.5x
        is not out of reach for wide products."""
    yield f"""**Batches**: {two["instructions"]:.1f} instructions a position at 2 rows,
        {four["instructions"]:.1f} at 4, {eight["instructions"]:.1f} at 8 (Triton's), where memory
        leaves time for 8.9. What is slower than cuBLAS the calibration leaves dense. Next: the
        notes' block-diagonal tensor core kernel (7.1 to 8.0), which is not written."""
    yield f"""**The head is dense**: {2 * 128256 * 4096 / 1e9:.2f} GB of every token. Packed at 50 %
        it would be {rows["W50", 1, "head"]["speedup"]:.2f}x as fast."""
