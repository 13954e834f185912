"""Products in float32 for CPUs without 16-bit instructions, against float64."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from prune_llm_kernels import wide_products
from prune_llm_kernels.wide_products import (
    MIN_ROWS,
    MIN_ROWS_OF_PAIRS,
    WideProducts,
    linear,
    multiplier,
    pays,
    product,
)

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without 16-bit instructions, whatever this one is."""
    monkeypatch.setattr(wide_products, "slow_dtypes", lambda: dict.fromkeys(DTYPES, MIN_ROWS))


@pytest.fixture
def counted(slow: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product that was widened."""
    rows: list[int] = []

    def count(x: Tensor, *rest: Tensor) -> Tensor:
        rows.append(len(x))
        return product(x, *rest)

    monkeypatch.setattr(wide_products, "product", count)
    return rows


def rounded_once(exact: Tensor, found: Tensor, sums: Tensor | float = 1e-5) -> None:
    """Half a unit in the last place of the result, and what float32's own sums may be off."""
    unit = torch.finfo(found.dtype).eps
    allowed = exact.abs() * (unit / 2) * 1.01 + sums
    assert found.isfinite().all()
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 1, 1), (65, 33, 7), (130, 257, 129)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("slice_bytes", [1, 4096, 2**25])
def test_a_product_is_rounded_once(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    with_bias: bool,
    slice_bytes: int,
    slow: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wide_products, "SLICE_BYTES", slice_bytes)
    T, I, O = shape
    x, weight = torch.randn(T, I).to(dtype), torch.randn(O, I).to(dtype)
    bias = torch.randn(O).to(dtype) if with_bias else None
    added = torch.zeros(O).double() if bias is None else bias.double()
    exact = x.double() @ weight.double().T + added
    magnitude = x.double().abs() @ weight.double().abs().T + added.abs()
    rounded_once(exact, linear(x, weight, bias), torch.finfo(torch.float32).eps * magnitude)
    assert linear(x, weight, bias).dtype == dtype


def test_leading_dimensions_and_no_rows(counted: list[int]) -> None:
    weight = torch.randn(5, 8).bfloat16()
    assert linear(torch.randn(2, 40, 8).bfloat16(), weight).shape == (2, 40, 5)
    assert linear(torch.randn(0, 8).bfloat16(), weight).shape == (0, 5)
    assert counted == [80]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modules_of_every_sort_are_widened(
    dtype: torch.dtype, mode: Callable[[], AbstractContextManager[None]], counted: list[int]
) -> None:
    T = MIN_ROWS
    plain, biased = nn.Linear(16, 9, bias=False).to(dtype), nn.Linear(16, 9).to(dtype)
    x = torch.randn(2, T, 16).to(dtype)
    with mode(), WideProducts():
        found = [plain(x), biased(x), torch.addmm(biased.bias, x[0], biased.weight.T)]
    assert counted == [2 * T, 2 * T, T]
    exact = x.double() @ plain.weight.double().T
    shifted = x.double() @ biased.weight.double().T + biased.bias.double()
    for y, reference in zip(found, [exact, shifted, shifted[0]], strict=True):
        rounded_once(reference, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_products_and_factors(dtype: torch.dtype, slow: None) -> None:
    a, b = torch.randn(3, MIN_ROWS, 17).to(dtype), torch.randn(3, 17, 6).to(dtype)
    add = torch.randn(3, MIN_ROWS, 6).to(dtype)
    with torch.inference_mode(), WideProducts():
        rounded_once(a.double() @ b.double(), a @ b)
    with WideProducts():
        rounded_once(a.double() @ b.double(), torch.bmm(a, b))
        rounded_once(
            0.5 * add.double() + 2 * (a.double() @ b.double()),
            torch.baddbmm(add, a, b, beta=0.5, alpha=2),
        )
        whole = torch.addmm(add[0], a[0], b[0], beta=0.5)
    rounded_once(0.5 * add[0].double() + a[0].double() @ b[0].double(), whole)


def test_few_rows_and_float32_stay_with_torch(counted: list[int]) -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad(), WideProducts():
        wide = layer(torch.randn(100, 8))
        layer.bfloat16()(torch.randn(MIN_ROWS - 1, 8).bfloat16())
    assert wide.dtype == torch.float32 and counted == []


def test_gradients_flow_through_widened_products(slow: None) -> None:
    x = torch.randn(MIN_ROWS, 12).bfloat16()
    layer, twin = nn.Linear(12, 70).bfloat16(), nn.Linear(12, 70).double()
    with torch.no_grad():
        twin.weight.copy_(layer.weight), twin.bias.copy_(layer.bias)
    with WideProducts():
        layer(x).sum().backward()
    twin(x.double()).sum().backward()
    assert layer.weight.grad is not None and twin.weight.grad is not None
    rounded_once(twin.weight.grad, layer.weight.grad)


def test_a_cpu_with_the_instructions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_products, "slow_dtypes", dict)
    monkeypatch.setattr(wide_products, "product", None)  # calling it would fail
    with WideProducts():
        nn.Linear(8, 8).bfloat16()(torch.randn(100, 8).bfloat16())
    linear(torch.randn(100, 8).bfloat16(), torch.randn(3, 8).bfloat16())


@pytest.mark.parametrize(("slow_pairs", "amx"), [(True, False), (True, True), (False, False)])
def test_slow_dot_products_are_left_to_many_rows(
    slow_pairs: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a CPU whose GEMM library knows both types: Intel's with and without AMX, and another."""
    monkeypatch.setattr(wide_products, "_CHECKS", {})
    monkeypatch.setattr(wide_products, "_slow_pairs", lambda: slow_pairs)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    found = wide_products.slow_dtypes.__wrapped__()
    expected = {torch.bfloat16: MIN_ROWS_OF_PAIRS} if slow_pairs and not amx else {}
    assert found == expected
    monkeypatch.setattr(wide_products, "slow_dtypes", lambda: found)
    x = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert [pays(x, rows) for rows in (255, 256)] == [False, bool(expected)]
    assert not pays(x.half(), 1000) and not pays(x.float(), 1000)


def test_slices_of_a_weight_convert_the_rows_once(slow: None) -> None:
    x, weight = torch.randn(2, 50, 33).bfloat16(), torch.randn(9, 33).bfloat16()
    bias, multiply = torch.randn(9).bfloat16(), multiplier(x)
    exact = x.double() @ weight.double().T + bias.double()
    y = torch.full((2, 50, 9), torch.nan, dtype=torch.bfloat16)
    for rows in (slice(0, 4), slice(4, 9)):
        y[..., rows] = multiply(weight[rows], bias[rows])
    rounded_once(exact, y)
    assert multiplier(x[0, :3])(weight, None).dtype == torch.bfloat16
