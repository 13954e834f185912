"""From predicted products to what was asked: the rows of predict_gpu.py and their page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from cases import parse_case
from gpu_cases import LLAMA_8B, TARGETS, Target, title
from gpu_prediction import (
    HIGH,
    LIKELY,
    LOW,
    Device,
    Product,
    Reached,
    best_grid,
    dense_stream,
    improved,
    step_seconds,
)

Launches = tuple[tuple[str, ...], tuple[str, ...]]  # of a block, and behind the last
Made = Sequence[tuple[str, str, int, Mapping[str, Product]]]  # case, masks, rows, by shape
Row = dict[str, Any]
CONTEXTS = (256, 4096)
SIZE = 2  # bytes of a weight
ATTENTION = 0.6  # share of the bandwidth that attention reaches
# a compiled dense step: four products, two norms with their additions, rotation with the cache,
# attention in two, SwiGLU's product, one more for what the compiler does not fuse
COMPILED = ("mm",) * 4 + ("small",) * 7
HEAD = ("small", "mm")
BLOCK = tuple(LLAMA_8B.shapes)
DEPENDENT = 0.3e-6  # seconds between nodes of which the next may begin early
# what would help, in this order, each on top of those before
CHANGES = (
    "as it is",
    "the best grid for each shape",
    "and no launch for lists, gaps of 0.3 us",
    "and 6.0 instructions a position",
)
DIAGONAL = {2: 7.1, 4: 7.3, 8: 8.0}  # instructions of the notes' tensor core kernel, section 4


def prediction(made: Made, plans: Mapping[tuple[bool, bool], Launches], device: Device) -> Row:
    """Everything the page says, as plain data."""
    singles = [one for one in made if one[2] == 1]
    return {
        "command": "python kernels/bench/predict_gpu.py",
        "measured": False,
        "device": asdict(device),
        "reached": {n: asdict(r) for n, r in (("likely", LIKELY), ("low", LOW), ("high", HIGH))},
        "attention": ATTENTION,
        "compiled": len(COMPILED),
        "launches": [
            {"weights": "packed" if pruned else "dense", "thresholds": gated,
             "block": len(block), "end": len(end), "names": list(block)}
            for (pruned, gated), (block, end) in plans.items()
        ],
        "products": [row for one in made for row in _product_rows(one, device)],
        "blocks": [_block_row(one, device) for one in made],
        "steps": [_step_row(one, n, plans, device) for one in singles for n in CONTEXTS],
        "next": [row for one in singles for row in _next_rows(one, plans, device)],
        "batches": [_diagonal_row(one, device) for one in made if one[2] > 1],
    }  # fmt: skip


def target_of(case: str, rows: int) -> Target:
    return next(t for t in TARGETS if t.case == case and rows in t.rows)


def _dense(O: int, I: int, device: Device, reached: Reached) -> float:
    return device.gap + dense_stream((O, I), SIZE, device, reached)


def _gains(dense: Sequence[float], ours: Sequence[float]) -> Row:
    """Speed-ups: likely, low, high."""
    names = ("speedup", "low", "high")
    return {n: round(d / o, 2) for n, d, o in zip(names, dense, ours, strict=True)}


def _product_rows(one: tuple[str, str, int, Mapping[str, Product]], device: Device) -> list[Row]:
    case, masks, rows, products = one
    found = []
    for name, product in products.items():
        shape = LLAMA_8B.shapes.get(name, (LLAMA_8B.vocabulary, LLAMA_8B.hidden))
        dense = [_dense(*shape, device, r) for r in (LIKELY, LOW, HIGH)]
        ours = [product.seconds(device, r) for r in (LIKELY, LOW, HIGH)]
        bounds = product.bounds(device, LIKELY)
        gains, target = _gains(dense, ours), target_of(case, rows).of(name)
        found.append({
            "case": title(case, masks), "rows": rows, "shape": name,
            "dense_bytes": shape[0] * shape[1] * SIZE, "moved_bytes": product.moved,
            "instructions": round(product.counts.instructions, 2),
            "balance": round(product.balance, 3), "splits": product.splits,
            "finish_us": round(1e6 * product.finish(device), 2),
            "bounds_us": {n: round(1e6 * s, 2) for n, s in bounds.items()},
            "bound": max(bounds, key=lambda n: bounds[n]),
            "us": round(1e6 * ours[0], 2), "dense_us": round(1e6 * dense[0], 2), **gains,
            "ceiling": _ceiling(products, [name], device),
            "target": None if name == "head" else target,
            "met": None if name == "head" else gains["speedup"] >= target,
        })  # fmt: skip
    return found


def _block_seconds(products: Mapping[str, Product], device: Device, reached: Reached) -> float:
    return sum(products[name].seconds(device, reached) for name in BLOCK)


def _dense_block(device: Device, reached: Reached) -> float:
    return sum(_dense(*shape, device, reached) for shape in LLAMA_8B.shapes.values())


def _block_row(one: tuple[str, str, int, Mapping[str, Product]], device: Device) -> Row:
    case, masks, rows, products = one
    dense = [_dense_block(device, r) for r in (LIKELY, LOW, HIGH)]
    ours = [_block_seconds(products, device, r) for r in (LIKELY, LOW, HIGH)]
    gains, target = _gains(dense, ours), target_of(case, rows)
    about = {"case": title(case, masks), "rows": rows, "us": round(1e6 * ours[0], 1)}
    met = gains["speedup"] >= target.kernel
    return {**about, "dense_us": round(1e6 * dense[0], 1), **gains,
            "ceiling": _ceiling(products, BLOCK, device), "target": target.kernel,
            "met": met}  # fmt: skip


def step(
    products: Mapping[str, Product] | None,
    launches: Launches,
    context: int,
    device: Device,
    reached: Reached,
) -> float:
    """Seconds of a token: all blocks, attention over the context, the dense head."""
    block, end = launches
    layers, shapes = LLAMA_8B.layers, LLAMA_8B.shapes
    if products is None:
        streams = [dense_stream(shape, SIZE, device, reached) for shape in shapes.values()]
        finishes = []
    else:
        streams = [products[name].stream(device, reached) for name in BLOCK]
        finishes = [products[name].finish(device) for name in BLOCK]
    cache = LLAMA_8B.cache_bytes(context, SIZE) / layers / (device.bandwidth * ATTENTION)
    head = dense_stream((LLAMA_8B.vocabulary, LLAMA_8B.hidden), SIZE, device, reached)
    blocks = layers * step_seconds(block, streams, finishes, cache, device)
    return blocks + step_seconds(end, [head], [], 0.0, device)


def _step_row(
    one: tuple[str, str, int, Mapping[str, Product]],
    context: int,
    plans: Mapping[tuple[bool, bool], Launches],
    device: Device,
) -> Row:
    case, masks, _, products = one
    pruned, skipped = parse_case(case)
    launches = plans[bool(pruned), bool(skipped)]
    reached = (LIKELY, LOW, HIGH)
    ours = [step(products, launches, context, device, r) for r in reached]
    plain = [step(None, plans[False, False], context, device, r) for r in reached]
    compiled = [step(None, (COMPILED, HEAD), context, device, r) for r in reached]
    gains, target = _gains(compiled, ours), target_of(case, 1).step
    assert target is not None
    return {
        "case": title(case, masks), "context": context, "ms": round(1e3 * ours[0], 3),
        "tokens_per_second": round(1 / ours[0]), "dense_plan_ms": round(1e3 * plain[0], 3),
        "compiled_ms": round(1e3 * compiled[0], 3), "over_dense_plan": round(plain[0] / ours[0], 2),
        **gains, "target": target, "met": gains["speedup"] >= target,
    }  # fmt: skip


def _next_rows(
    one: tuple[str, str, int, Mapping[str, Product]],
    plans: Mapping[tuple[bool, bool], Launches],
    device: Device,
) -> Iterator[Row]:
    """Kernels and step when CHANGES are made one after the other; dense stays as it is."""
    case, masks, _, products = one
    pruned, skipped = parse_case(case)
    launches = plans[bool(pruned), bool(skipped)]
    dense = _dense_block(device, LIKELY)
    compiled = step(None, (COMPILED, HEAD), CONTEXTS[0], device, LIKELY)
    changed, quick = dict(products), device
    for change in CHANGES:
        if change == CHANGES[1]:
            changed = best_grids(changed, device)
        elif change == CHANGES[2]:
            changed, quick = improved(changed, listed=False), replace(device, gap=DEPENDENT)
            launches = tuple(n for n in launches[0] if n != "list_channels"), launches[1]
        elif change == CHANGES[3] and pruned:
            counts = replace(products["o"].counts, instructions=6.0)
            changed = improved(changed, counts=counts)
        ours = step(changed, launches, CONTEXTS[0], quick, LIKELY)
        gain = dense / _block_seconds(changed, quick, LIKELY)
        yield {"case": title(case, masks), "change": change, "kernels": round(gain, 2),
               "step": round(compiled / ours, 2)}  # fmt: skip


def _diagonal_row(one: tuple[str, str, int, Mapping[str, Product]], device: Device) -> Row:
    """A batch with the instructions of the notes' kernel, and the best grids."""
    case, masks, rows, products = one
    counts = replace(products["o"].counts, instructions=DIAGONAL[rows])
    changed = best_grids(improved(products, counts=counts), device)
    gain = _dense_block(device, LIKELY) / _block_seconds(changed, device, LIKELY)
    return {"case": title(case, masks), "rows": rows, "instructions": DIAGONAL[rows],
            "kernels": round(gain, 2)}  # fmt: skip


def best_grids(products: Mapping[str, Product], device: Device) -> dict[str, Product]:
    """Of a block's products."""
    shapes = LLAMA_8B.shapes
    return {n: best_grid(products[n], shapes[n][1], device, LIKELY) for n in BLOCK}


def _ceiling(products: Mapping[str, Product], names: Sequence[str], device: Device) -> float:
    """Speed-up where everything reaches its limit, and nothing else takes time."""
    all_of = Reached(1.0, 1.0, 1.0)
    shapes = {**LLAMA_8B.shapes, "head": (LLAMA_8B.vocabulary, LLAMA_8B.hidden)}
    dense = sum(O * I * SIZE for O, I in (shapes[name] for name in names)) / device.bandwidth
    even = improved(products, balance=1.0)
    return round(dense / sum(max(even[n].bounds(device, all_of).values()) for n in names), 2)


def _yes(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[met]


def _band(row: Row) -> str:
    return f"{row['speedup']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"


def markdown(result: Row) -> Iterator[str]:
    """The page."""
    from gpu_prediction_prose import closing, opening

    yield from opening(result)
    yield "## Products, each alone against cuBLAS (both in a graph)"
    yield ""
    yield ("| shape | case | batch | MB dense | MB moved | instr. | balance | bound by | us "
           "| us dense | over cuBLAS [E] | ceiling | asked | met |")  # fmt: skip
    yield "|---" * 14 + "|"
    for row in result["products"]:
        yield (
            f"| {row['shape']} | {row['case']} | {row['rows']} | {row['dense_bytes'] / 1e6:.1f} "
            f"| {row['moved_bytes'] / 1e6:.1f} | {row['instructions']} | {row['balance']:.2f} "
            f"| {row['bound']} | {row['us']:.1f} | {row['dense_us']:.1f} | {_band(row)} "
            f"| {row['ceiling']:.2f}x | {row['target'] or ''} | {_yes(row['met'])} |"
        )
    yield ""
    yield "## The four products of a block together"
    yield ""
    yield "| case | batch | us | us dense | over cuBLAS [E] | ceiling | asked | met |"
    yield "|---" * 8 + "|"
    for row in result["blocks"]:
        yield (f"| {row['case']} | {row['rows']} | {row['us']:.1f} | {row['dense_us']:.1f} "
               f"| {_band(row)} | {row['ceiling']:.2f}x | {row['target']} "
               f"| {_yes(row['met'])} |")  # fmt: skip
    yield ""
    yield "## End to end: 32 blocks, attention, dense head, batch 1"
    yield ""
    yield ("| case | context | ms a token | tokens/s | over our plan with dense weights [E] "
           "| over a compiled dense step [E] | asked | met |")  # fmt: skip
    yield "|---" * 8 + "|"
    for row in result["steps"]:
        yield (f"| {row['case']} | {row['context']} | {row['ms']:.2f} | {row['tokens_per_second']} "
               f"| {row['over_dense_plan']:.2f}x | {_band(row)} | {row['target']} "
               f"| {_yes(row['met'])} |")  # fmt: skip
    yield ""
    yield from closing(result)
