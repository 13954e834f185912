"""Channel-major weights and gated plans against the float64 reference, on every instruction set."""

from itertools import product

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import ChannelWeight, PackedWeight, cpu, reference, to_channels
from prune_llm_kernels.cpu_plan import CpuPlan
from prune_llm_kernels.plan import Gate, Plan
from prune_llm_kernels.reference_plan import ReferencePlan

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (64, 64), (130, 77), (200, 300), (65, 129)]
ISAS = cpu.isa_names()


def make_weight(O: int, I: int, density: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(O, I) * (torch.rand(O, I) < density)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", [64, 128, 320])
def test_packing_is_the_reference_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, int], tile: int
) -> None:
    for density in (0.0, 0.3, 1.0):
        packed = reference.pack(make_weight(*shape, density, dtype))
        found, expected = to_channels(packed, tile), reference.pack_channels(packed, tile)
        assert torch.equal(bits(found.data), bits(expected.data))
        assert found.starts is not None and torch.equal(found.starts, expected.starts)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_gives_back_every_bit(isa: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = make_weight(*shape, 0.5, dtype)
        for given, tile in product((weight, reference.pack(weight)), (128, 320)):
            channels = to_channels(given, tile)
            assert torch.equal(cpu.unpack_channels(channels, isa), weight)
            assert torch.equal(reference.unpack_channels(channels), weight)


def test_the_stored_form_comes_back_with_its_kept_zeros() -> None:
    keep = torch.zeros(6, 16, dtype=torch.bool)
    keep[:, ::2] = True
    weight = torch.randn(6, 16).bfloat16() * keep
    weight[2, 4] = 0  # kept, and zero
    packed = reference.pack_kept(weight, keep, fixed_count=True)
    back = to_channels(packed).stored()
    assert isinstance(back, PackedWeight) and back.offsets is None
    assert torch.equal(back.bitmask, packed.bitmask) and torch.equal(back.packed, packed.packed)


def run_gated(plan: Plan, weight: ChannelWeight, x: Tensor, gate: Gate, bias: Tensor) -> Tensor:
    out = torch.full((len(x), weight.out_features), float("nan")).to(x.dtype)
    plan.linears(x, [weight], [bias], [out], gate=gate)
    plan.run()
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_gated_products_are_as_exact_as_the_dense_op(
    isa: str, dtype: torch.dtype, rows: int
) -> None:
    torch.manual_seed(rows)
    for O, I in SHAPES:
        weight = make_weight(O, I, 0.5, dtype)
        x, bias = torch.randn(rows, I).to(dtype), torch.randn(O).to(dtype)
        thresholds = torch.rand(rows)
        scales = torch.rand(I) + 0.5 if rows % 2 else None
        if rows > 2:
            thresholds[1], thresholds[2] = -1, torch.inf
        counted = reference.counting(x, thresholds, scales)
        exact = torch.where(counted, x, 0).double() @ weight.double().T + bias.double()
        for given, tile in product((weight, reference.pack(weight)), (64, 320)):
            channels = to_channels(given, tile)
            ours, plain = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
            gate = Gate(thresholds, scales, ours)
            found = run_gated(CpuPlan(dtype, isa), channels, x, gate, bias)
            expected = run_gated(
                ReferencePlan(dtype), channels, x, Gate(thresholds, scales, plain), bias
            )
            allowed = 2 * (expected.double() - exact).abs().max()
            allowed += torch.finfo(dtype).eps * exact.abs().max()
            assert (found.double() - exact).abs().max() <= allowed
            assert ours[1:].equal(plain[1:])
            assert rows > 8 or ours.equal(plain)  # more rows are listed eight at a time


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_in_one_pass(isa: str, dtype: torch.dtype) -> None:
    for O, I, rows in ((130, 77, 1), (64, 200, 3), (1, 5, 2)):
        pair = [make_weight(O, I, 0.5, dtype) for _ in range(2)]
        gate_weight, up_weight = (to_channels(reference.pack(weight), 64) for weight in pair)
        biases = torch.randn(O).to(dtype), None
        x, gate = torch.randn(rows, I).to(dtype), Gate(torch.full((rows,), 0.4))
        outs = []
        for plan in (CpuPlan(dtype, isa), ReferencePlan(dtype)):
            out = torch.full((rows, O), float("nan")).to(dtype)
            plan.swiglu(x, (gate_weight, up_weight), biases, out, gate)
            plan.run()
            outs.append(out.double())
        scale = outs[1].abs().max()
        assert (outs[0] - outs[1]).abs().max() <= 4 * torch.finfo(dtype).eps * scale


def test_products_of_one_plan_share_memory_and_not_results() -> None:
    shapes, dtype = [(130, 77, 1), (300, 200, 5), (1, 1, 1), (64, 300, 2)], torch.bfloat16
    together, apart, expected = CpuPlan(dtype), [], []
    for O, I, rows in shapes:
        weight = to_channels(reference.pack(make_weight(O, I, 0.5, dtype)), 320)
        x, bias = torch.randn(rows, I).to(dtype), torch.randn(O).to(dtype)
        gate = Gate(torch.full((rows,), 0.5))
        apart.append(run_gated(CpuPlan(dtype), weight, x, gate, bias))
        expected.append(torch.full((rows, O), float("nan")).to(dtype))
        together.linears(x, [weight], [bias], [expected[-1]], gate=gate)
    for _ in range(2):
        together.run()
        assert all(map(torch.equal, apart, expected))
        for out in expected:
            out.fill_(float("nan"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_with_every_input_is_the_same_alone_and_beside_others(threads: int) -> None:
    before = torch.get_num_threads()
    weight = to_channels(reference.pack(make_weight(300, 200, 0.5, torch.bfloat16)), 192)
    x, bias = torch.randn(9, 200).bfloat16(), torch.randn(300).bfloat16()
    x[:, ::3] = 0  # zeros that a row alone could skip
    every = torch.full((9,), -1.0)
    torch.set_num_threads(threads)
    try:
        together = run_gated(CpuPlan(torch.bfloat16), weight, x, Gate(every), bias)
        for row in range(9):
            one = slice(row, row + 1)
            alone = run_gated(CpuPlan(torch.bfloat16), weight, x[one], Gate(every[one]), bias)
            assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(before)


def test_thresholds_are_read_at_every_run_and_nan_always_counts() -> None:
    weight = to_channels(make_weight(64, 32, 1.0, torch.float32))
    x, thresholds = torch.randn(1, 32), torch.zeros(1)
    x[0, 3] = float("nan")
    counts, out = torch.zeros(3, dtype=torch.int64), torch.zeros(1, 64)
    plan = CpuPlan(torch.float32)
    plan.linears(x, [weight], [None], [out], gate=Gate(thresholds, None, counts))
    plan.run()
    assert counts.tolist() == [32, 32, 1] and out.isnan().all()
    thresholds[0] = 1e9
    plan.run()
    assert counts.tolist() == [33, 33, 2] and out.isnan().all()
    thresholds[0] = torch.inf
    plan.run()
    assert counts.tolist() == [33, 33, 2] and torch.equal(out, torch.zeros(1, 64))


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_channel_linear_by_any_number_of_rows(rows: int) -> None:
    weight = make_weight(130, 77, 0.5, torch.bfloat16)
    x, bias = torch.randn(rows, 77).bfloat16(), torch.randn(130).bfloat16()
    exact = x.double() @ weight.double().T + bias.double()
    for given in (weight, reference.pack(weight)):
        found = cpu.channel_linear(x, to_channels(given, 64), bias).double()
        assert (found - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_what_a_gated_plan_refuses() -> None:
    weight, x = torch.randn(64, 32), torch.randn(1, 32)
    out, gate = torch.zeros(1, 64), Gate(torch.zeros(1))
    plan = CpuPlan(torch.float32)
    with pytest.raises(ValueError, match="needs channel-major weights"):
        plan.linears(x, [weight], [None], [out], gate=gate)
    mixed = [to_channels(weight), weight]
    with pytest.raises(ValueError, match="some are channel-major"):
        plan.linears(x, mixed, [None, None], [out, out.clone()], gate=gate)
    with pytest.raises(ValueError, match=r"thresholds is torch.float32 of shape \[2\]"):
        plan.linears(x, [to_channels(weight)], [None], [out], gate=Gate(torch.zeros(2)))
    with pytest.raises(ValueError, match="tile 100: must be a multiple of 64"):
        to_channels(weight, 100)
