"""What a decode step does between its linears, in Triton: norm, SwiGLU's product, attention.

gpu_step.py launches these and says what they compute. Everything is float32 inside and rounded once
where it is written. Grids depend on shapes only; positions and pages are read on the device: a CUDA
graph serves every token.

Attention is split over the context (flash-decoding): programs of one warp read shares of 16-token
blocks and write partial results side by side, `combine` adds them in their order. Whole blocks are
read without a mask on tokens, which would cost a load for each; what lies behind a query or before
its window is dropped by a selection, so that not even NaN there can be seen.

Names: SIZE = head size, HEAD = SIZE rounded up to a power of two, GROUP = query heads of a program,
LANES = tokens of a block.
"""
# mypy: ignore-errors
# the language of kernels is Triton's; its types are not Python's

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, y, columns, eps, BLOCK: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * weight; one program a row, BLOCK at least its columns."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    row = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    factors = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(row * row, 0) / columns
    normed = row * tl.rsqrt(mean + eps) * factors
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(gate, up, y, elements, BLOCK: tl.constexpr):
    """y = gate / (1 + e^-gate) * up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    gates = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    ups = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    product = gates / (1 + tl.exp(-gates)) * ups
    tl.store(y + at, product.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _lane_block(pages, block, kv, kv_heads, page_blocks, cache_pages):
    """Where in the cache a row's block of one head lies, counted in blocks; int64.

    A page that the cache does not have becomes one that it has: nothing checks tables on a GPU.
    """
    page = tl.load(pages + block // page_blocks)
    page = tl.minimum(tl.maximum(page, 0), cache_pages - 1)
    return (page * kv_heads + kv) * page_blocks + block % page_blocks


@triton.jit
def _rotated(x, cosine, sine, pair, inside, HALF: tl.constexpr):
    """Elements i and i + HALF of x, turned together. One thread reads and has both: x may be
    written to."""
    low = tl.load(x + pair, mask=inside, other=0).to(tl.float32)
    high = tl.load(x + HALF + pair, mask=inside, other=0).to(tl.float32)
    low_turned = low * tl.load(cosine + pair, mask=inside, other=0)
    low_turned -= high * tl.load(sine + pair, mask=inside, other=0)
    high_turned = high * tl.load(cosine + HALF + pair, mask=inside, other=0)
    high_turned += low * tl.load(sine + HALF + pair, mask=inside, other=0)
    return low_turned, high_turned


@triton.jit
def rotate_and_store(
    q, k, v, cosine, sine, keys, values, pages, positions, heads, kv_heads, page_blocks,
    cache_pages, columns,
    SIZE: tl.constexpr, HALF: tl.constexpr, HEAD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program a row and head: the first ``heads`` rotate q in place, the others put the rotated
    k and v in the cache. HALF of the rotated elements turn with the other half."""
    WIDTH: tl.constexpr = (SIZE + LANES - 1) // LANES * LANES
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if (position >= 0) & (position < columns * page_blocks * LANES):
        pair, element = tl.arange(0, HEAD), tl.arange(0, HEAD)
        turned = pair < HALF
        cosine += position.to(tl.int64) * (2 * HALF)
        sine += position.to(tl.int64) * (2 * HALF)
        if head < heads:
            q += (row * heads + head) * SIZE
            low, high = _rotated(q, cosine, sine, pair, turned, HALF)
            tl.store(q + pair, low.to(q.dtype.element_ty), mask=turned)
            tl.store(q + HALF + pair, high.to(q.dtype.element_ty), mask=turned)
        else:
            kv = head - heads
            k += (row * kv_heads + kv) * SIZE
            v += (row * kv_heads + kv) * SIZE
            block, lane = position // LANES, position % LANES
            at = _lane_block(pages + row * columns, block, kv, kv_heads, page_blocks, cache_pages)
            keys += at * (SIZE * LANES) + lane
            values += (at * LANES + lane) * WIDTH
            low, high = _rotated(k, cosine, sine, pair, turned, HALF)
            tl.store(keys + pair * LANES, low.to(keys.dtype.element_ty), mask=turned)
            tl.store(keys + (HALF + pair) * LANES, high.to(keys.dtype.element_ty), mask=turned)
            rest = (element >= 2 * HALF) & (element < SIZE)
            tl.store(keys + element * LANES, tl.load(k + element, mask=rest), mask=rest)
            inside = element < SIZE
            tl.store(values + element, tl.load(v + element, mask=inside), mask=inside)


@triton.jit
def _span(position, capacity, window, splits, LANES: tl.constexpr):
    """What a query sees: the first block, how many there are, and how many a split reads.

    No block for a row that is left out or lies behind its pages.
    """
    live = (position >= 0) & (position < capacity)
    first = tl.maximum(position + 1 - window, 0) // LANES
    blocks = tl.where(live, tl.maximum(position, 0) // LANES + 1 - first, 0)
    return first, blocks, tl.maximum(tl.cdiv(blocks, splits), 1)


@triton.jit
def _with_block(query, key, value, seen, maximum, total, sums):
    """One step of the online softmax (Milakov & Gimelshein 2018) of one query over a block."""
    scores = tl.sum(key.to(tl.float32) * query[:, None], 0)
    scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, 0))
    weights, shrunk = tl.exp2(scores - larger), tl.exp2(maximum - larger)
    added = tl.sum(weights[:, None] * value.to(tl.float32), 0)
    return larger, total * shrunk + tl.sum(weights, 0), sums * shrunk + added


@triton.jit
def attend(
    q, keys, values, pages, positions, partials, maxima, sums, heads, kv_heads, page_blocks,
    cache_pages, columns, window, splits, scale,
    SIZE: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partials[row, head, split] = the sum of 2^(score - maximum) v over a share of the context,
    with the maximum and the sum of the weights. Shares that hold nothing are not written.

    ``scale`` has the factor log2(e); ``window`` is larger than every position where there is none.
    The heads of a group are tuples of tensors: one tensor of them all would not fit the registers.
    """
    WIDTH: tl.constexpr = (SIZE + LANES - 1) // LANES * LANES
    split, row = tl.program_id(0), tl.program_id(2)
    group = heads // kv_heads
    parts = tl.cdiv(group, GROUP)
    kv, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    position = tl.load(positions + row).to(tl.int32)
    first, blocks, share = _span(position, columns * page_blocks * LANES, window, splits, LANES)
    begin = first + split * share
    end = tl.minimum(begin + share, first + blocks)
    if begin < end:
        element, lane = tl.arange(0, HEAD), tl.arange(0, LANES)
        stored, padded = element < SIZE, element < WIDTH
        queries, maxima_G, totals_G, sums_GD = (), (), (), ()
        for member in tl.static_range(GROUP):  # behind the group's last, the last again
            head = kv * group + tl.minimum(part * GROUP + member, group - 1)
            query = tl.load(q + (row * heads + head) * SIZE + element, mask=stored, other=0)
            queries += (query.to(tl.float32) * scale,)
            maxima_G += (tl.full([], float("-inf"), tl.float32),)
            totals_G += (tl.full([], 0.0, tl.float32),)
            sums_GD += (tl.zeros([HEAD], tl.float32),)
        for block in range(begin, end):
            at = _lane_block(pages + row * columns, block, kv, kv_heads, page_blocks, cache_pages)
            of_keys = keys + at * (SIZE * LANES) + element[:, None] * LANES + lane[None, :]
            of_values = values + at * (LANES * WIDTH) + lane[:, None] * WIDTH + element[None, :]
            key = tl.load(of_keys, mask=stored[:, None], other=0)
            value = tl.load(of_values, mask=padded[None, :], other=0)
            token = block * LANES + lane
            seen = (token <= position) & (token > position - window)
            value = tl.where(seen[:, None], value, tl.zeros_like(value))
            new_maxima, new_totals, new_sums = (), (), ()
            for member in tl.static_range(GROUP):
                maximum, total, sum_D = _with_block(
                    queries[member], key, value, seen,
                    maxima_G[member], totals_G[member], sums_GD[member],
                )  # fmt: skip
                new_maxima += (maximum,)
                new_totals += (total,)
                new_sums += (sum_D,)
            maxima_G, totals_G, sums_GD = new_maxima, new_totals, new_sums
        for member in tl.static_range(GROUP):
            if part * GROUP + member < group:
                to = (row * heads + kv * group + part * GROUP + member) * splits + split
                tl.store(maxima + to, maxima_G[member])
                tl.store(sums + to, totals_G[member])
                tl.store(partials + to.to(tl.int64) * SIZE + element, sums_GD[member], mask=stored)


@triton.jit
def combine(
    partials, maxima, sums, positions, out, heads, capacity, window, splits,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, SLICE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """out[row, head], SLICE of its elements: the splits together. Zeros for a row left out, NaN for
    one that lies behind its pages: nothing checks positions on a GPU."""
    row = tl.program_id(2)
    position = tl.load(positions + row).to(tl.int32)
    _first, blocks, share = _span(position, capacity, window, splits, LANES)
    split = tl.arange(0, SPLITS)
    written = split < tl.cdiv(blocks, share)
    query = row * heads + tl.program_id(1)
    at = query * splits + split
    maximum = tl.load(maxima + at, mask=written, other=float("-inf"))
    peak = tl.where(blocks > 0, tl.max(maximum, 0), 0.0)
    factor = tl.exp2(maximum - peak)
    total = tl.sum(factor * tl.load(sums + at, mask=written, other=0), 0)
    element = tl.program_id(0) * SLICE + tl.arange(0, SLICE)
    inside = element < SIZE
    from_ = partials + at.to(tl.int64)[:, None] * SIZE + element[None, :]
    parts = tl.load(from_, mask=written[:, None] & inside[None, :], other=0)
    result = tl.sum(parts * factor[:, None], 0) / tl.where(blocks > 0, total, 1.0)
    result = tl.where(position >= capacity, float("nan"), result)
    tl.store(out + query * SIZE + element, result.to(out.dtype.element_ty), mask=inside)
