"""The GPU kernels in Triton's interpreter, against float64: no GPU is needed.

Inputs are new in every run; a test that fails prints its seed. The interpreter rounds float32 to
bfloat16 towards zero, which a GPU does not: there sums are compared before they are rounded.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import ChannelWeight, channel_weight, gpu, gpu_layout, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (33, 131), (260, 128)]  # one output; two chunks, one ragged; two blocks
ROWS = [1, 3, 4, 16]


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    value = random.SystemRandom().randrange(2**31)
    torch.manual_seed(value)
    print(f"torch.manual_seed({value})")  # shown when the test fails
    yield value


def make_weight(O: int, I: int, density: float, dtype: torch.dtype) -> Tensor:
    return torch.where(torch.rand(O, I) < density, torch.randn(O, I), 0).to(dtype)


def packed(weight_OI: Tensor) -> ChannelWeight:
    return gpu_layout.pack_channels(reference.pack(weight_OI), 256)


def dense(weight_OI: Tensor) -> ChannelWeight:
    return channel_weight._dense_channels(weight_OI, 256)


def assert_as_exact_as_dense(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """At most twice the error of torch's op in the same dtype, with the weight in either order."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    orders = weight, weight.T.contiguous().T
    allowed = 2 * max((F.linear(x, w, bias).double() - exact).abs().max() for w in orders)
    unit = torch.finfo(y.dtype).eps * (2 if y.dtype is torch.bfloat16 else 0.5)
    assert (y.double() - exact).abs().max() <= allowed + unit * exact.abs().max()


def assert_sums(partials_SBO: Tensor, x: Tensor, weight: Tensor) -> None:
    """The sums are float32's: their error is far below the rounding of 16-bit results."""
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T
    assert ((partials_SBO.double().sum(0) - exact).abs() <= 2e-6 * bound + 1e-30).all()


@pytest.mark.parametrize(
    ("dtype", "rows"), [(dtype, rows) for dtype in DTYPES for rows in (1, 16)]
    + [(torch.bfloat16, 3), (torch.bfloat16, 4)], ids=str,
)  # fmt: skip
def test_every_channel(dtype: torch.dtype, rows: int) -> None:
    for O, I in SHAPES:
        weight = make_weight(O, I, 0.5, dtype)
        x, bias = torch.randn(rows, I).to(dtype), torch.randn(O).to(dtype)
        channels = packed(weight)
        assert_sums(gpu._partials(x, None, channels), x, weight)
        assert_as_exact_as_dense(gpu.channel_linear(x, channels, bias), x, weight, bias)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.7, 1.0])
def test_every_density(density: float) -> None:
    weight, x = make_weight(70, 131, density, torch.float16), torch.randn(2, 131).half()
    y = gpu.channel_linear(x, packed(weight), None)
    assert_as_exact_as_dense(y, x, weight, None)
    assert density > 0 or torch.equal(y, torch.zeros(2, 70).half())


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [(torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 4), (torch.bfloat16, 16)],
    ids=str,
)
@pytest.mark.parametrize("form", [packed, dense], ids=["packed", "dense"])
def test_listed_channels(dtype: torch.dtype, rows: int, form: object) -> None:
    assert callable(form)
    O, I = 33, 131
    weight, x = make_weight(O, I, 0.5, dtype), torch.randn(rows, I).to(dtype)
    thresholds, scales = torch.rand(rows), torch.rand(I) + 0.5 if rows % 2 else None
    kept = torch.where(reference.counting(x, thresholds, scales), x, 0)
    channels = gpu.list_channels(x, thresholds, scales)
    assert_sums(gpu._partials(channels.x_CBN, channels, form(weight)), kept, weight)
    y = gpu.listed_linear(channels, form(weight), None)
    assert_as_exact_as_dense(y, kept, weight, None)


@pytest.mark.parametrize("rows", [17, 40])
@pytest.mark.parametrize("form", [packed, dense], ids=["packed", "dense"])
def test_more_rows_than_the_kernels_take(form: object, rows: int) -> None:
    """Prompts beside answers: the product is the dense one, of every row's own inputs."""
    assert callable(form)
    O, I = 66, 131
    weight, x = make_weight(O, I, 0.5, torch.float32), torch.randn(rows, I)
    bias, thresholds, scales = torch.randn(O), torch.rand(rows), torch.rand(I) + 0.5
    x[3, 7] = float("nan")
    thresholds[1], thresholds[2] = -1, torch.inf
    kept = torch.where(reference.counting(x, thresholds, scales), x, 0)
    channels = gpu.list_channels(x, thresholds, scales)
    y = gpu.listed_linear(channels, form(weight), bias)
    good = torch.arange(rows) != 3
    assert y.shape == (rows, O) and y[3].isnan().all()
    assert_as_exact_as_dense(y[good], kept[good], weight, bias)
    assert_as_exact_as_dense(y[1:2], x[1:2], weight, bias)
    assert torch.equal(y[2], bias)
    assert channels.counts_C.tolist() == [gpu.CHUNK, I - gpu.CHUNK]
    assert channels.listed_CN.flatten()[:I].tolist() == list(range(I))
    assert channels.x_CBN.is_contiguous() and (channels.listed_CN < I).all()
    thresholds[3], x[3] = 0.5, 0
    kept[3] = 0
    listed = gpu.list_channels(x, thresholds, scales)
    y, found = gpu.listed_swiglu(listed, form(weight), bias, thresholds, None)
    gate, up = F.linear(kept.double(), weight.double(), bias.double()).chunk(2, -1)
    assert torch.allclose(y.double(), F.silu(gate) * up, rtol=1e-4, atol=1e-4)
    assert found is not None
    assert torch.equal(found.x_CBN, gpu.list_channels(y, thresholds, None).x_CBN)


@pytest.mark.parametrize("rows", ROWS)
def test_the_list_is_exact(rows: int) -> None:
    I = 300
    x, thresholds, scales = torch.randn(rows, I), torch.rand(rows), torch.rand(I) + 0.5
    x[0, 7] = float("nan")
    if rows > 2:
        thresholds[1], thresholds[2] = -1, torch.inf
    counted = reference.counting(x, thresholds, scales)
    found = gpu.list_channels(x, thresholds, scales)
    for chunk, count in enumerate(found.counts_C.tolist()):
        first = chunk * gpu.CHUNK
        expected = counted.any(0)[first : first + gpu.CHUNK].nonzero().flatten() + first
        assert found.listed_CN[chunk, :count].tolist() == expected.tolist()
        kept = torch.where(counted, x, 0)[:, expected]
        assert torch.equal(found.x_CBN[chunk, :, :count].nan_to_num(9), kept.nan_to_num(9))
        # places behind the last repeat it, with nothing to add
        repeated = expected[-1] if count else torch.tensor(first)
        assert (found.listed_CN[chunk, count:] == repeated).all()
        assert (found.x_CBN[chunk, :, count:] == 0).all()


@pytest.mark.parametrize("form", [packed, dense], ids=["packed", "dense"])
def test_no_channel_and_every_channel(form: object) -> None:
    assert callable(form)
    weight = make_weight(70, 131, 0.5, torch.float32)
    x, bias = torch.randn(2, 131), torch.randn(70)
    none = gpu.list_channels(x, torch.full((2,), 1e9), None)
    assert torch.equal(gpu.listed_linear(none, form(weight), bias), bias.expand(2, 70))
    every = gpu.list_channels(x, torch.full((2,), -1.0), None)
    y = gpu.listed_linear(every, form(weight), bias)
    assert_as_exact_as_dense(y, x, weight, bias)
    if form is packed:  # the same additions in the same order
        assert torch.equal(y, gpu.channel_linear(x, packed(weight), bias))


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float16, 3), (torch.float32, 1), (torch.float32, 16)], ids=str
)
def test_gate_and_up_and_the_next_list(dtype: torch.dtype, rows: int) -> None:
    O, I = 140, 60
    pair = [make_weight(O, I, 0.5, dtype) for _ in range(2)]
    stacked = packed(torch.cat(pair))
    x, bias = torch.randn(rows, I).to(dtype), torch.randn(2 * O).to(dtype)
    thresholds, scales = torch.rand(rows) / 4, torch.rand(O) + 0.5
    channels = gpu.list_channels(x, torch.full((rows,), -1.0), None)
    y, following = gpu.listed_swiglu(channels, stacked, bias, thresholds, scales)
    gate, up = (F.linear(x.double(), w.double(), b.double()) for w, b in
                zip(pair, bias.split(O), strict=True))  # fmt: skip
    exact = F.silu(gate) * up
    # rounded once; and what float32 sums of I products may be off, through both factors
    sums = (1 + I / 4) * torch.finfo(torch.float32).eps * gate.abs().max() * up.abs().max()
    rounding = 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() <= rounding + sums
    # the list is the one that a kernel of its own makes of the rounded product
    assert following is not None
    again = gpu.list_channels(y, thresholds, scales)
    assert torch.equal(following.listed_CN, again.listed_CN)
    assert torch.equal(following.x_CBN, again.x_CBN)
    assert torch.equal(following.counts_C, again.counts_C)
    assert gpu.listed_swiglu(channels, stacked, None, None, None)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_is_exact(dtype: torch.dtype) -> None:
    weight, x = make_weight(260, 11, 0.5, dtype), torch.randn(gpu.MAX_ROWS + 1, 11).to(dtype)
    assert torch.equal(gpu.dense_columns(packed(weight))[:, :260].T, weight)
    assert_as_exact_as_dense(gpu.channel_linear(x, packed(weight), None), x, weight, None)


def test_a_row_has_the_same_bits_alone_and_beside_others() -> None:
    weight, x = packed(make_weight(33, 131, 0.5, torch.float32)), torch.randn(4, 131)
    together = gpu.channel_linear(x, weight, None)
    for row in range(4):
        assert torch.equal(gpu.channel_linear(x[row], weight, None), together[row])


def test_shapes_around_the_kernels() -> None:
    weight = make_weight(33, 40, 0.5, torch.float32)
    x = torch.randn(2, 3, 40)
    assert gpu.channel_linear(x, packed(weight), None).shape == (2, 3, 33)
    assert gpu.channel_linear(x[:0], packed(weight), None).shape == (0, 3, 33)
    torch.testing.assert_close(gpu.channel_linear(x, dense(weight), None), F.linear(x, weight))
    parts = reference.pack(weight)
    y = gpu.sparse_linear(x, parts.bitmask, parts.packed, parts.offsets, None)
    torch.testing.assert_close(y, F.linear(x, weight))


@pytest.mark.parametrize(
    ("blocks", "chunks", "processors"), [(8, 32, 132), (56, 32, 132), (1, 1, 132), (28, 112, 30)]
)
def test_splits_cover_the_chunks(blocks: int, chunks: int, processors: int) -> None:
    each = gpu.chunks_per_split(blocks, chunks, processors)
    splits = -(-chunks // each)
    assert 1 <= each <= chunks and (splits - 1) * each < chunks
    assert splits == chunks or blocks * splits >= 2 * processors


def test_splits_leave_no_multiprocessor_much_more_than_the_others() -> None:
    """The products of an 8B block on 132 multiprocessors: mean over most of the chunks read."""
    for blocks, chunks in ((12, 32), (8, 32), (56, 32), (8, 112), (251, 32)):
        each = gpu.chunks_per_split(blocks, chunks, 132)
        programs = blocks * -(-chunks // each)
        busiest = -(-programs // 132) * each
        assert blocks * chunks / 132 / busiest > 0.95
