"""Every instruction set of this machine against a float64 product, on shapes that fit nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import PackedWeight, cpu, reference

MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (3, 7), (8, 8), (5, 31), (33, 64), (7, 65), (50, 100), (129, 517), (16, 1000)]
ISAS = cpu.isa_names()


def ids(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def assert_as_accurate(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Error against float64 at most twice that of torch's dense op, plus one rounding of y."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    dense = F.linear(x, weight, bias)
    assert y.dtype == dense.dtype and y.shape == dense.shape
    if not y.numel():
        return
    error, allowed = (y - exact).abs().max(), 2 * (dense - exact).abs().max()
    rounding = torch.finfo(y.dtype).eps * exact.abs().max()
    assert error <= allowed + rounding, f"error {error:.3g}, allowed {allowed:.3g} + {rounding:.3g}"


def sparse_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, isa: str | None = None
) -> Tensor:
    return cpu.sparse_linear(x, packed.bitmask, packed.packed, packed.offsets, bias, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"O{shape[0]}-I{shape[1]}")
def test_odd_shapes(
    isa: str, dtype: torch.dtype, shape: tuple[int, int], make_weight: MakeWeight
) -> None:
    O, I = shape
    # not what earlier tests left: where torch's error happens to be tiny, twice that is too
    torch.manual_seed(O * 1000 + I)
    for density in (0.0, 0.2, 0.5, 1.0):
        weight = make_weight(O, I, density, dtype)
        packed = reference.pack(weight)
        for batch in (1, 3, 20):
            x = torch.randn(batch, I).to(dtype)
            assert_as_accurate(sparse_linear(x, packed, isa=isa), x, weight)
            assert_as_accurate(cpu.dense_linear(x, weight, None, isa), x, weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_every_batch_with_bias(isa: str, dtype: torch.dtype, make_weight: MakeWeight) -> None:
    weight, bias = make_weight(70, 333, 0.4, dtype), torch.randn(70).to(dtype)
    packed = reference.pack(weight)
    for batch in range(18):
        x = torch.randn(batch, 333).to(dtype)
        assert_as_accurate(sparse_linear(x, packed, bias, isa), x, weight, bias)
        assert_as_accurate(cpu.dense_linear(x, weight, bias, isa), x, weight, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_long_rows(isa: str, dtype: torch.dtype, make_weight: MakeWeight) -> None:
    weight = make_weight(24, 14336, 0.5, dtype)
    x = torch.randn(2, 14336).to(dtype)
    assert_as_accurate(sparse_linear(x, reference.pack(weight), isa=isa), x, weight)
    assert_as_accurate(cpu.dense_linear(x, weight, None, isa), x, weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(("n", "m", "I"), [(2, 4, 36), (4, 8, 200), (1, 4, 4), (2, 4, 4096)])
def test_fixed_count_per_row(isa: str, dtype: torch.dtype, n: int, m: int, I: int) -> None:
    keep = torch.rand(19, I // m, m).argsort(-1) < n
    weight = ((torch.rand(19, I) + 0.5) * keep.reshape(19, I)).to(dtype)
    packed = reference.pack(weight, fixed_count=True)
    assert packed.packed.shape == (19, I * n // m)
    for batch in (1, 5, 17):
        x = torch.randn(batch, I).to(dtype)
        assert_as_accurate(sparse_linear(x, packed, isa=isa), x, weight)
    assert torch.equal(cpu.unpack(packed.bitmask, packed.packed, None, I, isa), weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_unpack_is_exact(isa: str, dtype: torch.dtype, make_weight: MakeWeight) -> None:
    for O, I in SHAPES:
        weight = make_weight(O, I, 0.5, dtype)
        packed = reference.pack(weight)
        dense = cpu.unpack(packed.bitmask, packed.packed, packed.offsets, I, isa)
        assert torch.equal(dense, weight)
        assert torch.equal(
            dense.view(torch.uint8), weight.abs().mul(weight.sign()).view(torch.uint8)
        )


@pytest.mark.parametrize("isa", ISAS)
def test_uneven_rows(isa: str) -> None:
    """Empty rows, full rows, and a last row so short that wide loads would leave the buffer."""
    weight = torch.zeros(67, 300)
    weight[:64:2], weight[5] = torch.randn(32, 300), 1.5  # many, so that torch's error is not luck
    weight[65, ::2] = -0.25
    weight[66, 299] = 3
    packed = reference.pack(weight)
    for batch in (1, 2, 9):
        x = torch.randn(batch, 300)
        assert_as_accurate(sparse_linear(x, packed, isa=isa), x, weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_same_bits_for_any_thread_number_and_batch(
    isa: str, dtype: torch.dtype, make_weight: MakeWeight
) -> None:
    weight = make_weight(301, 777, 0.5, dtype)
    packed, x = reference.pack(weight), torch.randn(16, 777).to(dtype)
    torch.set_num_threads(1)
    single, dense = sparse_linear(x, packed, isa=isa), cpu.dense_linear(x, weight, None, isa)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(sparse_linear(x, packed, isa=isa), single)
        assert torch.equal(cpu.dense_linear(x, weight, None, isa), dense)
    for row in range(16):
        assert torch.equal(sparse_linear(x[row], packed, isa=isa), single[row])
    assert torch.equal(sparse_linear(x[:6], packed, isa=isa), single[:6])


@pytest.mark.parametrize("isa", ISAS)
def test_not_a_number_and_infinity_survive(isa: str) -> None:
    packed = reference.pack(torch.eye(40, dtype=torch.bfloat16))
    x = torch.ones(40, dtype=torch.bfloat16)
    x[3], x[17] = torch.nan, torch.inf
    expected = F.linear(x, torch.eye(40, dtype=torch.bfloat16))
    assert torch.equal(sparse_linear(x, packed, isa=isa).isnan(), expected.isnan())


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_of_every_float16(isa: str) -> None:
    """Subnormals, the largest number and both infinities go through a product with 1 unchanged."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    weight = bits.view(torch.float16)[:, None].contiguous()
    x = torch.ones(1, 1, dtype=torch.float16)
    y = cpu.dense_linear(x, weight, None, isa)[0]
    same = (y == weight[:, 0]) | (y.isnan() & weight[:, 0].isnan())
    assert bool(same.all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_rounds_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """A float32 accumulator is rounded once: 1 + k/4 units in the last place, as torch rounds."""
    eps = torch.finfo(dtype).eps
    weight = torch.ones(1, 2, dtype=dtype)
    for magnitude in (1.0, 2.0**-14 if dtype == torch.float16 else 2.0**-100, 2.0**15):
        steps = torch.arange(-12, 13) / 4 * eps
        x = torch.stack([torch.full((25,), magnitude), steps * magnitude], dim=1)
        exact = (x.to(dtype).float()[:, 0] + x.to(dtype).float()[:, 1]).to(dtype)
        for row in range(25):
            assert cpu.dense_linear(x[row].to(dtype), weight, None, isa)[0] == exact[row]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "batched"])
def test_any_input_layout(layout: str, make_weight: MakeWeight) -> None:
    weight = make_weight(20, 48, 0.5, torch.float32)
    x = {
        "transposed": torch.randn(48, 5).t(),
        "sliced": torch.randn(5, 96)[:, ::2],
        "batched": torch.randn(2, 3, 4, 48),
    }[layout]
    assert_as_accurate(sparse_linear(x, reference.pack(weight)), x, weight)
