"""The GPU kernels in Triton: what runs on the device, and nothing else.

gpu.py launches them and says what they compute. Importing this needs triton; it decides then
whether kernels are compiled or, with TRITON_INTERPRET=1, interpreted on the CPU.

A packed kernel gives every thread four neighbouring outputs, a nibble of a mask word, for all
channels it reads: the sums stay in the thread, and one population count finds the place of four
weights. Sums are float32 and are added in one order: splits write partial sums side by side, and a
second kernel adds them. Nothing is added to by several programs.

Names: B = rows of x rounded up to a power of two, STEP = channels read at once, CHUNK = channels
that share a list, BLOCK = outputs of a program, NATIVE = compiled, not interpreted.
"""
# mypy: ignore-errors
# the language of kernels is Triton's; its types are not Python's

import triton
import triton.language as tl


def load_code(bfloat16: bool, block: int) -> str:
    """PTX: the 16-bit weights of the bits of $5, at $4 + 2 $6 behind a segment's mask, as float32.

    $7 is 2, but the compiler must not know: a product of an unknown with a place is one instruction
    (IMAD.WIDE), a shifted sum of 64 bits is two or more; so is one with a constant, but for what a
    load adds itself.
    """
    convert = "mov.b32 ${}, {{z, h}};" if bfloat16 else "cvt.f32.f16 ${}, h;"
    registers = ".reg .pred p; .reg .b16 h, z; .reg .b32 t, o; .reg .b64 a, b;"
    lines = [
        f"{{{registers} mov.b16 z, 0; mad.wide.u32 b, $6, $7, $4; mov.u64 a, b; and.b32 o, $5, 1;"
    ]
    for i in range(4):
        address = "mad.wide.u32 a, o, $7, b; @p add.u32 o, o, 1;" if i else ""
        lines.append(f"and.b32 t, $5, {1 << i}; setp.ne.u32 p, t, 0; mov.b16 h, 0;")
        lines.append(f"{address} @p ld.global.nc.b16 h, [a + {block // 8}]; {convert.format(i)}")
    return " ".join(lines) + "}"


@triton.jit
def _popcount(word, NATIVE: tl.constexpr):
    """Set bits of an int32."""
    if NATIVE:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], tl.int32, True, 1)
    pairs = word - ((word >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((((nibbles + (nibbles >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@triton.jit
def _counting(x, thresholds, scales, live, SCALED: tl.constexpr):
    """Which of x [B, CHUNK] count: |x| * scale > threshold, every NaN; none of an infinite row."""
    scores = tl.abs(x.to(tl.float32))
    if SCALED:
        scores = scores * scales[None, :]
    small = scores <= thresholds[:, None]
    return (~small) & (thresholds < float("inf"))[:, None] & live


@triton.jit
def _write_list(
    x, counted, chunk, limits, listed, listed_x, counts, totals, rows,
    B: tl.constexpr, CHUNK: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """The channels of a chunk that any row counts, in order, and their inputs.

    Behind them the last one again with inputs of zero: a reader takes STEP at a time, unmasked.
    With TOTAL the numbers of channels, inputs and rows that count are added to ``totals``, int64:
    sums of integers are the same in any order.
    """
    channel, row = tl.arange(0, CHUNK), tl.arange(0, B)
    any_row = tl.max(counted.to(tl.int32), 0)
    number = tl.sum(any_row, 0)
    before = tl.cumsum(any_row, 0) - any_row
    place = tl.where(any_row != 0, before, number + channel - before)
    last = tl.max(tl.where(any_row != 0, channel, 0), 0)
    chosen = chunk * CHUNK + tl.where(any_row != 0, channel, last)
    tl.store(listed + chunk * CHUNK + place, chosen)
    to = listed_x + (chunk * rows + row[:, None]) * CHUNK + place[None, :]
    tl.store(to, tl.where(counted, x, tl.zeros_like(x)), mask=(row < rows)[:, None])
    tl.store(counts + chunk, number)
    if TOTAL:
        tl.atomic_add(totals, number.to(tl.int64))
        tl.atomic_add(totals + 1, tl.sum(tl.sum(counted.to(tl.int32), 1), 0).to(tl.int64))
        if chunk == 0:
            live = ((limits < float("inf")) & (row < rows)).to(tl.int32)
            tl.atomic_add(totals + 2, tl.sum(live, 0).to(tl.int64))


@triton.jit
def list_channels(
    x, thresholds, scales, listed, listed_x, counts, totals, rows, columns,
    B: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """One program a chunk of x [rows, columns]."""
    chunk = tl.program_id(0)
    row = tl.arange(0, B)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    live = (row < rows)[:, None] & (column < columns)[None, :]
    inputs = tl.load(x + row[:, None] * columns + column[None, :], mask=live, other=0)
    limits = tl.load(thresholds + row, mask=row < rows, other=float("inf"))
    factors = tl.load(scales + column, mask=column < columns, other=0) if SCALED else limits
    counted = _counting(inputs, limits, factors, live, SCALED)
    _write_list(
        inputs, counted, chunk, limits, listed, listed_x, counts, totals, rows, B, CHUNK, TOTAL
    )


@triton.jit
def _channels(
    x, listed, chunk, first, rows, columns,
    B: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, LISTED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """STEP channels of a chunk from place ``first`` on, and their inputs [B, STEP].

    Places behind the last channel give a channel that exists, and zeros.
    """
    place = tl.max_contiguous(tl.multiple_of(first + tl.arange(0, STEP), STEP), STEP)
    row = tl.arange(0, B)
    inside = (row < rows)[:, None]
    if LISTED:
        channel = tl.load(listed + chunk * CHUNK + place)
        at = (chunk * rows + row[:, None]) * CHUNK + place[None, :]
    else:
        channel = chunk * CHUNK + place
        at = row[:, None] * columns + channel[None, :]
        if not EVEN:
            inside = inside & (channel < columns)[None, :]
            channel = tl.minimum(channel, columns - 1)
    inputs = tl.load(x + at, mask=inside, other=0)
    return channel, inputs.to(tl.float32)


@triton.jit
def dense_linear(
    x, listed, counts, weight, partials, rows, columns, outputs, per_split, chunks, width,
    B: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """partials[split] = x W^T over a dense weight [columns, width], its listed channels only."""
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    inside = output < outputs
    sums = tl.zeros([B, BLOCK], tl.float32)
    for chunk in range(split * per_split, tl.minimum((split + 1) * per_split, chunks)):
        end = tl.load(counts + chunk) if LISTED else tl.minimum(CHUNK, columns - chunk * CHUNK)
        for first in range(0, end, STEP):
            channel, inputs = _channels(
                x, listed, chunk, first, rows, columns, B, CHUNK, STEP, LISTED, EVEN
            )
            at = weight + channel.to(tl.int64)[:, None] * width + output[None, :]
            values = tl.load(at, mask=inside[None, :], other=0)
            sums += tl.sum(values.to(tl.float32)[None] * inputs[:, :, None], 1)
    row = tl.arange(0, B)
    to = partials + (split * rows + row[:, None]) * outputs + output[None, :]
    tl.store(to, sums, mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def _segments(data, words, starts, channel, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """The nibble of every thread, [STEP, BLOCK / 32, 8]; the address of the channel's segment,
    [STEP, 1, 1]; and how many of its values lie before the nibble's."""
    SIZE: tl.constexpr = data.dtype.element_ty.primitive_bitwidth // 8
    unit = tl.load(starts + channel).to(tl.int64)
    masks = tl.load(words + unit[:, None] * 4 + tl.arange(0, BLOCK // 32)[None, :])
    ones = _popcount(masks, NATIVE)
    before_word = tl.cumsum(ones, 1) - ones
    shift = 4 * tl.arange(0, 8)[None, None, :]
    lower = masks[:, :, None] & ((1 << shift) - 1)
    before = before_word[:, :, None] + _popcount(lower, NATIVE)
    segment = data + unit * (16 // SIZE)
    return (masks[:, :, None] >> shift) & 15, segment[:, None, None], before


@triton.jit
def _values(nibble, segment, before, BLOCK: tl.constexpr):
    """The four weights of each nibble, zero where the mask has no bit."""
    SIZE: tl.constexpr = segment.dtype.element_ty.primitive_bitwidth // 8
    at = segment + (BLOCK // 8 // SIZE + before)
    one = at + (nibble & 1)
    two = one + ((nibble >> 1) & 1)
    three = two + ((nibble >> 2) & 1)
    first = tl.load(at, mask=(nibble & 1) != 0, other=0)
    second = tl.load(one, mask=(nibble & 2) != 0, other=0)
    third = tl.load(two, mask=(nibble & 4) != 0, other=0)
    fourth = tl.load(three, mask=(nibble & 8) != 0, other=0)
    return first, second, third, fourth


@triton.jit
def _floats(nibble, segment, before, size, BLOCK: tl.constexpr, LOAD: tl.constexpr):
    """As _values, in float32; with PTX where there is some."""
    if LOAD is not None:
        base = tl.broadcast_to(segment.to(tl.int64), before.shape)
        scale = tl.zeros_like(before) + size
        first, second, third, fourth = tl.inline_asm_elementwise(
            LOAD, "=r,=r,=r,=r,l,r,r,r", [base, nibble, before, scale],
            (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    else:
        a, b, c, d = _values(nibble, segment, before, BLOCK)
        first, second = a.to(tl.float32), b.to(tl.float32)
        third, fourth = c.to(tl.float32), d.to(tl.float32)
    return first, second, third, fourth


@triton.jit
def _interleaved(first, second, third, fourth, SHAPE: tl.constexpr):
    """Four tensors, element by element behind each other."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), SHAPE)


@triton.jit
def packed_linear(
    x, listed, counts, data, words, starts, partials, rows, columns, outputs, per_split, chunks,
    size,
    B: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """partials[split] = x W^T over a packed weight, its listed channels only."""
    WORDS: tl.constexpr = BLOCK // 32
    block, split = tl.program_id(0), tl.program_id(1)
    first_sums = tl.zeros([B, WORDS, 8], tl.float32)
    second_sums, third_sums, fourth_sums = first_sums, first_sums, first_sums
    for chunk in range(split * per_split, tl.minimum((split + 1) * per_split, chunks)):
        end = tl.load(counts + chunk) if LISTED else tl.minimum(CHUNK, columns - chunk * CHUNK)
        for first in range(0, end, STEP):
            channel, inputs = _channels(
                x, listed, chunk, first, rows, columns, B, CHUNK, STEP, LISTED, EVEN
            )
            nibble, segment, before = _segments(
                data, words, starts + block * columns, channel, BLOCK, NATIVE
            )
            a, b, c, d = _floats(nibble, segment, before, size, BLOCK, LOAD)
            factor = inputs[:, :, None, None]
            first_sums += tl.sum(a[None] * factor, 1)
            second_sums += tl.sum(b[None] * factor, 1)
            third_sums += tl.sum(c[None] * factor, 1)
            fourth_sums += tl.sum(d[None] * factor, 1)
    sums = _interleaved(first_sums, second_sums, third_sums, fourth_sums, [B, BLOCK])
    row, output = tl.arange(0, B), block * BLOCK + tl.arange(0, BLOCK)
    to = partials + (split * rows + row[:, None]) * outputs + output[None, :]
    tl.store(to, sums, mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit
def packed_matmul(
    x, listed, counts, data, words, starts, partials, rows, columns, outputs, per_split, chunks,
    B: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    LISTED: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """As packed_linear for 16 rows at a time: weights are spread in registers, then multiplied."""
    block, split = tl.program_id(0), tl.program_id(1)
    sums = tl.zeros([B, BLOCK], tl.float32)
    for chunk in range(split * per_split, tl.minimum((split + 1) * per_split, chunks)):
        end = tl.load(counts + chunk) if LISTED else tl.minimum(CHUNK, columns - chunk * CHUNK)
        for first in range(0, end, STEP):
            channel, inputs = _channels(
                x, listed, chunk, first, rows, columns, B, CHUNK, STEP, LISTED, EVEN
            )
            nibble, segment, before = _segments(
                data, words, starts + block * columns, channel, BLOCK, NATIVE
            )
            a, b, c, d = _values(nibble, segment, before, BLOCK)
            dense = _interleaved(a, b, c, d, [STEP, BLOCK])
            if NATIVE:
                sums = tl.dot(inputs.to(dense.dtype), dense, sums, input_precision="ieee")
            else:  # the interpreter multiplies the bits of bfloat16
                sums += tl.dot(inputs, dense.to(tl.float32), input_precision="ieee")
    row, output = tl.arange(0, B), block * BLOCK + tl.arange(0, BLOCK)
    to = partials + (split * rows + row[:, None]) * outputs + output[None, :]
    tl.store(to, sums, mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit
def unpack(
    data, words, starts, dense, columns, width,
    STEP: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """dense [columns, width] of a packed weight; width a multiple of BLOCK."""
    block = tl.program_id(0)
    channel = tl.program_id(1) * STEP + tl.arange(0, STEP)
    existing = tl.minimum(channel, columns - 1)
    nibble, segment, before = _segments(
        data, words, starts + block * columns, existing, BLOCK, NATIVE
    )
    a, b, c, d = _values(nibble, segment, before, BLOCK)
    output = block * BLOCK + tl.arange(0, BLOCK)
    to = dense + channel.to(tl.int64)[:, None] * width + output[None, :]
    tl.store(to, _interleaved(a, b, c, d, [STEP, BLOCK]), mask=(channel < columns)[:, None])


@triton.jit
def _total(partials, row, output, rows, outputs, inside, splits):
    """The sum of the splits in their order, [B, outputs of the program].

    Eight are read at once: each read waits for the second cache, and there are few programs.
    """
    at = partials + row[:, None] * outputs + output[None, :]
    wide = rows * outputs
    total = tl.load(at, mask=inside, other=0)
    for first in range(1, splits, 8):
        a = tl.load(at + first * wide, mask=inside, other=0)
        b = tl.load(at + (first + 1) * wide, mask=inside & (first + 1 < splits), other=0)
        c = tl.load(at + (first + 2) * wide, mask=inside & (first + 2 < splits), other=0)
        d = tl.load(at + (first + 3) * wide, mask=inside & (first + 3 < splits), other=0)
        e = tl.load(at + (first + 4) * wide, mask=inside & (first + 4 < splits), other=0)
        f = tl.load(at + (first + 5) * wide, mask=inside & (first + 5 < splits), other=0)
        g = tl.load(at + (first + 6) * wide, mask=inside & (first + 6 < splits), other=0)
        h = tl.load(at + (first + 7) * wide, mask=inside & (first + 7 < splits), other=0)
        total = (((((((total + a) + b) + c) + d) + e) + f) + g) + h
    return total


@triton.jit
def finish_linears(
    partials, bias, second_bias, third_bias, y, second_y, third_y,
    rows, outputs, second, third, splits,
    B: tl.constexpr, CHUNK: tl.constexpr, BIASED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The sum of the splits + bias, or with ADD y + that, of up to three products side by side.

    The second begins at output ``second``, the third at ``third``, multiples of CHUNK; where there
    is none, at ``outputs`` or behind. Each y has as many columns as outputs are its own.
    """
    row, output = tl.arange(0, B), tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    begin, end = tl.program_id(0) * 0, tl.minimum(second, outputs)
    if tl.program_id(0) * CHUNK >= third:
        y, bias, begin, end = third_y, third_bias, third, outputs
    elif tl.program_id(0) * CHUNK >= second:
        y, bias, begin, end = second_y, second_bias, second, tl.minimum(third, outputs)
    inside = (row < rows)[:, None] & (output < end)[None, :]
    total = _total(partials, row, output, rows, outputs, inside, splits)
    if BIASED:
        total += tl.load(bias + output - begin, mask=output < end, other=0).to(tl.float32)[None, :]
    to = y + row[:, None] * (end - begin) + (output - begin)[None, :]
    if ADD:
        total += tl.load(to, mask=inside, other=0).to(tl.float32)
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finish_swiglu(
    partials, bias, second_bias, y, thresholds, scales, listed, listed_x, counts, totals,
    rows, outputs, splits,
    B: tl.constexpr, CHUNK: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr,
    LIST: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """y = silu(first half) * second half of the sums, and the list of its large channels."""
    chunk = tl.program_id(0)
    row, output = tl.arange(0, B), chunk * CHUNK + tl.arange(0, CHUNK)
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    wide = 2 * outputs
    gate = _total(partials, row, output, rows, wide, inside, splits)
    up = _total(partials, row, outputs + output, rows, wide, inside, splits)
    if BIASED:
        gate += tl.load(bias + output, mask=output < outputs, other=0).to(tl.float32)[None, :]
        up += tl.load(second_bias + output, mask=output < outputs, other=0).to(tl.float32)[None, :]
    product = (gate / (1 + tl.exp(-gate)) * up).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * outputs + output[None, :], product, mask=inside)
    if LIST:
        limits = tl.load(thresholds + row, mask=row < rows, other=float("inf"))
        factors = tl.load(scales + output, mask=output < outputs, other=0) if SCALED else limits
        counted = _counting(product, limits, factors, inside, SCALED)
        _write_list(
            product, counted, chunk, limits, listed, listed_x, counts, totals, rows, B, CHUNK, TOTAL
        )
