"""Recorded decode steps against float64, on every instruction set of this machine."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import PackedWeight, cpu, reference
from prune_llm_kernels.cpu_plan import CpuPlan
from prune_llm_kernels.kv_cache import KeyValueCache
from prune_llm_kernels.plan import AttentionStep, new_plan
from prune_llm_kernels.reference_plan import ReferencePlan, attend, rms_norm, rotate, silu_mul

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ISAS = cpu.isa_names()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def plan(isa: str, dtype: torch.dtype) -> CpuPlan:
    return CpuPlan(dtype, isa)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def assert_rounded(found: Tensor, exact: Tensor, slack: float = 4.0) -> None:
    """Within `slack` roundings of the dtype, and of float32 sums, of the exact result."""
    form = torch.finfo(found.dtype)
    allowed = slack * form.eps / 2 * exact.abs() + 3e-6 * exact.abs().max()
    allowed += form.smallest_normal * form.eps  # half of it, below the normal numbers
    worst = (found.double() - exact).abs() - allowed
    assert found.isfinite().all()
    assert (worst <= 0).all(), f"off by {float(worst.max()):.3g} more than allowed"


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 33), (2, 4, 64), (1, 2050)])
def test_rms_norm(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    out = poisoned(*shape, dtype=dtype)
    recorded = plan(isa, dtype)
    recorded.rms_norm(x, weight, 1e-5, out)
    recorded.rms_norm(x, weight, 1e-5, in_place := x.clone())
    recorded.run()
    exact = rms_norm(x.double(), weight, 1e-5)
    assert_rounded(out, exact)
    assert torch.equal(out, in_place)


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (1, 4100)])
def test_silu_mul(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape) * 20).to(dtype), torch.randn(shape).to(dtype)
    out = poisoned(*shape, dtype=dtype)
    recorded = plan(isa, dtype)
    recorded.silu_mul(gate, up, out)
    recorded.run()
    assert_rounded(out, silu_mul(gate.double(), up.double()))


def test_silu_of_extremes(isa: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    out = poisoned(7, dtype=torch.float32)
    recorded = plan(isa, torch.float32)
    recorded.silu_mul(gate, torch.ones(7), out)
    recorded.run()
    assert out.isfinite().all()
    assert torch.allclose(out[1:], gate[1:].clamp(min=0), atol=1e-5)


@pytest.mark.parametrize("columns", [5, 64, 200])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_linears_share_an_input(isa: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns).to(dtype)
    dense = [torch.randn(O, columns).to(dtype) * (torch.rand(O, columns) < 0.5) for O in (7, 70, 1)]
    weights: list[PackedWeight | Tensor] = [reference.pack(w) for w in dense[:2]]
    weights.append(dense[2])
    biases = [None, torch.randn(70).to(dtype), None]
    outs = [poisoned(rows, len(w), dtype=dtype) for w in dense]
    recorded = plan(isa, dtype)
    recorded.linears(x, weights, biases, outs)
    recorded.run()
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        if isinstance(weight, PackedWeight):
            args = (weight.bitmask, weight.packed, weight.offsets, bias)
            assert torch.equal(out, cpu.sparse_linear(x, *args, isa=isa))
        else:
            assert torch.equal(out, cpu.dense_linear(x, weight, bias, isa))


@pytest.mark.parametrize(("O", "columns"), [(7, 5), (30, 64), (50, 1500), (131, 2077)])
def test_many_rows_have_the_bits_of_one(isa: str, dtype: torch.dtype, O: int, columns: int) -> None:
    """Tiles of many rows add in the order of a row alone; against float64 as well."""
    x = torch.randn(101, columns).to(dtype)
    weight = torch.randn(O, columns).to(dtype) * (torch.rand(O, columns) < 0.5)
    bias, before = torch.randn(O).to(dtype), torch.randn(101, O).to(dtype)
    exact = before.double() + x.double() @ weight.double().T + bias.double()
    for form in (weight, reference.pack(weight)):
        out, alone = before.clone(), before.clone()
        recorded = plan(isa, dtype)
        recorded.linears(x, [form], [bias], [out], accumulate=True)
        recorded.run()
        for row in range(101):
            recorded = plan(isa, dtype)
            part = slice(row, row + 1)
            recorded.linears(x[part], [form], [bias], [alone[part]], accumulate=True)
            recorded.run()
        assert torch.equal(out, alone)
        assert_rounded(out, exact)


def test_accumulate_adds_before_it_rounds(isa: str, dtype: torch.dtype) -> None:
    x, dense = torch.randn(2, 100).to(dtype), torch.randn(50, 100).to(dtype)
    out = torch.randn(2, 50).to(dtype)
    exact = out.double() + x.double() @ dense.double().T
    recorded = plan(isa, dtype)
    recorded.linears(x, [dense], [None], [out], accumulate=True)
    recorded.run()
    assert_rounded(out, exact)


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_size: int
    rotary: int
    window: int = 0


SHAPES = [
    Shape(1, 1, 2, 2),
    Shape(4, 4, 64, 64),
    Shape(8, 1, 64, 64),
    Shape(14, 2, 80, 40),
    Shape(6, 2, 33, 16),
    Shape(3, 1, 256, 256),
    Shape(4, 2, 128, 128, window=20),
    Shape(9, 3, 16, 0),
]


def make_step(shape: Shape, positions: list[int], dtype: torch.dtype) -> AttentionStep:
    """Random past tokens; NaN in every place of the cache that must not be read."""
    B, H, K, D = len(positions), shape.heads, shape.kv_heads, shape.head_size
    capacity = max(1, *positions) + 3
    cache = KeyValueCache.allocate(B + 1, K, capacity, D, dtype)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    pages = torch.randperm(B + 1)[:B, None]
    for page, position in zip(pages.flatten().tolist(), positions, strict=True):
        past = max(0, position)
        cache.write(page, 0, torch.randn(K, past, D).to(dtype), torch.randn(K, past, D).to(dtype))
    angles = torch.rand(cache.page_size, shape.rotary) * 6
    return AttentionStep(
        torch.randn(B, H, D).to(dtype),
        torch.randn(B, K, D).to(dtype),
        torch.randn(B, K, D).to(dtype),
        poisoned(B, H, D, dtype=dtype),
        angles.cos(),
        angles.sin(),
        cache,
        pages,
        torch.tensor(positions),
        D**-0.5,
        shape.window,
    )


def on_pages(step: AttentionStep, page_size: int) -> AttentionStep:
    """The same tokens on small pages, dealt out at random; NaN wherever there is no token."""
    cache, B = step.cache, len(step.positions_B)
    N = -(-cache.page_size // page_size)
    small = KeyValueCache.allocate(
        B * N + 2, cache.kv_heads, page_size, cache.head_size, cache.keys.dtype
    )
    small.keys.fill_(torch.nan)
    small.values.fill_(torch.nan)
    pages_BN = torch.randperm(small.pages)[: B * N].view(B, N).contiguous()
    for b, position in enumerate(step.positions_B.tolist()):
        keys, values = cache.read(step.pages_BN[b].tolist(), max(0, position))
        for n, page in enumerate(pages_BN[b].tolist()):
            part = slice(n * page_size, (n + 1) * page_size)
            small.write(page, 0, keys[:, part], values[:, part])
    angles = (
        torch.cat([angle, angle.new_zeros(N * page_size - len(angle), angle.shape[1])])
        for angle in (step.cosine_TR, step.sine_TR)
    )
    cosine_TR, sine_TR = angles
    return replace(
        copied(step), cache=small, pages_BN=pages_BN, cosine_TR=cosine_TR, sine_TR=sine_TR
    )


def copied(step: AttentionStep) -> AttentionStep:
    cache = KeyValueCache(step.cache.keys.clone(), step.cache.values.clone(), step.cache.head_size)
    return replace(step, q_BHD=step.q_BHD.clone(), out_BHD=step.out_BHD.clone(), cache=cache)


def exact_attention(step: AttentionStep, b: int) -> Tensor:
    """float64 [H, D], from keys and queries rounded to the dtype after their rotation."""
    position, pages = int(step.positions_B[b]), step.pages_BN[b].tolist()
    angles = step.cosine_TR[position][None].double(), step.sine_TR[position][None].double()
    rotated = [
        rotate(x[b][None].double(), *angles)[0].to(x.dtype) for x in (step.q_BHD, step.k_BKD)
    ]
    keys, values = step.cache.read(pages, position)
    keys = torch.cat([keys, rotated[1][:, None]], 1)
    values = torch.cat([values, step.v_BKD[b][:, None]], 1)
    return attend(rotated[0].double(), keys, values, step.scale, step.window)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(isa: str, dtype: torch.dtype, shape: Shape) -> None:
    step = make_step(shape, [0, 15, 16, -1, 300], dtype)
    exact = [exact_attention(step, b) for b in (0, 1, 2, 4)]
    recorded = plan(isa, dtype)
    recorded.attention(step)
    recorded.run()
    # a rotated element that lies between two values of the dtype may round to the other one
    for row, expected in zip((0, 1, 2, 4), exact, strict=True):
        error = (step.out_BHD[row].double() - expected).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max() + 1e-5
    assert not step.out_BHD[3].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_and_neighbours_do_not_change_a_bit(isa: str, shape: Shape) -> None:
    step = make_step(shape, [40, 0, 517], torch.bfloat16)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 8):
        one = copied(step)
        recorded = plan(isa, torch.bfloat16)
        recorded.attention(one)
        torch.set_num_threads(threads)
        recorded.run()
        results.append(one.out_BHD)
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    alone = replace(
        copied(step),
        q_BHD=step.q_BHD[2:].clone(),
        k_BKD=step.k_BKD[2:].clone(),
        v_BKD=step.v_BKD[2:].clone(),
        out_BHD=poisoned(1, *step.q_BHD.shape[1:], dtype=torch.bfloat16),
        pages_BN=step.pages_BN[2:].clone(),
        positions_B=step.positions_B[2:].clone(),
    )
    recorded = plan(isa, torch.bfloat16)
    recorded.attention(alone)
    recorded.run()
    assert torch.equal(alone.out_BHD[0], results[0][2])


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_do_not_change_a_bit(
    isa: str, dtype: torch.dtype, shape: Shape, page_size: int
) -> None:
    step = make_step(shape, [0, 15, 16, -1, 300, 47], dtype)
    paged = on_pages(step, page_size)
    for one in (step, paged):
        recorded = plan(isa, dtype)
        recorded.attention(one)
        recorded.run()
    assert step.out_BHD.isfinite().all()
    assert torch.equal(paged.out_BHD, step.out_BHD)
    found, expected = (one.cache.read(one.pages_BN[4].tolist(), 301) for one in (paged, step))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_may_be_successive_tokens_of_one_sequence(isa: str, dtype: torch.dtype) -> None:
    """A run over many tokens equals runs of one token each, bit for bit."""
    T, N, H, K, D = 70, 5, 4, 2, 32
    q, k, v = (torch.randn(T, heads, D).to(dtype) for heads in (H, K, K))
    angles = torch.rand(N * 16, D) * 6
    outs = []
    for rows in (1, 7, T):
        cache = KeyValueCache.allocate(N + 1, K, 16, D, dtype)
        pages_BN = torch.tensor([3, 0, 5, 1, 2]).repeat(rows, 1)
        buffers = [torch.zeros(rows, heads, D, dtype=dtype) for heads in (H, K, K)]
        out_BHD, positions_B = poisoned(rows, H, D, dtype=dtype), torch.zeros(rows, dtype=int)
        step = AttentionStep(
            *buffers, out_BHD, angles.cos(), angles.sin(), cache, pages_BN, positions_B, D**-0.5
        )
        recorded = plan(isa, dtype)
        recorded.attention(step)
        out = []
        for start in range(0, T, rows):
            for buffer, whole in zip(buffers, (q, k, v), strict=True):
                buffer.copy_(whole[start : start + rows])
            positions_B.copy_(torch.arange(start, start + rows))
            recorded.run()
            out.append(out_BHD.clone())
        outs.append(torch.cat(out))
    assert outs[0].isfinite().all() and outs[0].any()
    assert all(torch.equal(outs[0], other) for other in outs[1:])


@pytest.mark.parametrize("name", ["fast", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 23])
def test_fewer_rows_are_the_first_ones(name: str, dtype: torch.dtype, rows: int) -> None:
    """What a run of some rows computes is what a run of all does; the rest is not touched."""
    B, I, H, D = 23, 40, 2, 8
    weight, norm, x = torch.randn(H * D, I), torch.randn(I), torch.randn(B, I)
    step = make_step(Shape(H, H, D, D), [3] * B, dtype)
    whole, part = [], []
    for wanted, count in ((whole, None), (part, rows)):
        mine = copied(step)
        outs = [poisoned(B, H * D, dtype=dtype) for _ in range(2)]
        buffers = [x.to(dtype).clone(), *outs]
        recorded = CpuPlan(dtype) if name == "fast" else ReferencePlan(dtype)
        recorded.rms_norm(buffers[0], norm.to(dtype), 1e-5, buffers[0])
        recorded.linears(buffers[0], [weight.to(dtype)], [None], [buffers[1]])
        recorded.silu_mul(buffers[1], buffers[1], buffers[2])
        k_BKD, v_BKD = step.k_BKD.clone(), step.v_BKD.clone()
        recorded.attention(replace(mine, q_BHD=buffers[2].view(B, H, D), k_BKD=k_BKD, v_BKD=v_BKD))
        recorded.run(count)
        wanted += [*buffers, mine.out_BHD]
    for all_rows, some, before in zip(whole, part, (x.to(dtype), None, None, None), strict=True):
        if name == "fast":
            assert torch.equal(some[:rows], all_rows[:rows])
        else:  # torch's own products, whose order of sums depends on the rows
            assert torch.allclose(some[:rows], all_rows[:rows], atol=1e-5, rtol=2e-2)
        rest = some[rows:]
        assert rest.isnan().all() if before is None else torch.equal(rest, before[rows:])


@pytest.mark.parametrize("name", ["fast", "reference"])
@pytest.mark.parametrize("rows", [0, 4, -1])
def test_more_rows_than_a_buffer_has_are_refused(name: str, rows: int) -> None:
    recorded = CpuPlan(torch.float32) if name == "fast" else ReferencePlan(torch.float32)
    x = torch.zeros(3, 8)
    recorded.silu_mul(x, x, x)
    with pytest.raises(ValueError, match=f"rows {rows}: must be between 1 and the 3"):
        recorded.run(rows)


def test_a_plan_replays_what_its_buffers_hold(isa: str) -> None:
    """Token after token through one recording equals the reference, cache and all."""
    step = make_step(Shape(4, 2, 32, 32), [5, 11], torch.float32)
    other = copied(step)
    fast, plain = plan(isa, torch.float32), ReferencePlan(torch.float32)
    fast.attention(step)
    plain.attention(other)
    for _ in range(4):
        for tensor in (step.k_BKD, step.v_BKD):
            tensor.normal_()
        step.q_BHD.normal_()
        other.q_BHD.copy_(step.q_BHD)
        fast.run()
        plain.run()
        assert torch.allclose(step.out_BHD, other.out_BHD, atol=1e-5)
        step.positions_B.add_(1)  # both steps hold this tensor
    length = int(step.positions_B[1])
    for a, b in zip(
        step.cache.read(step.pages_BN[1].tolist(), length),
        other.cache.read(step.pages_BN[1].tolist(), length),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-6)


def test_cache_keeps_what_is_written() -> None:
    cache = KeyValueCache.allocate(2, 3, 40, 20, torch.float32)
    keys, values = torch.randn(3, 37, 20), torch.randn(3, 37, 20)
    cache.write(1, 0, keys[:, :18], values[:, :18])
    cache.write(1, 18, keys[:, 18:], values[:, 18:])
    found = cache.read([1], 37)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert not cache.keys[0].any()
    assert cache.page_size == 48
    with pytest.raises(ValueError, match="tokens 40 to 77: a page holds 48"):
        cache.write(0, 40, keys, values)
    cache.write(0, 0, keys[:, :9], values[:, :9])
    both = cache.read([1, 0], 57)
    assert torch.equal(both[0][:, 48:], keys[:, :9]) and torch.equal(both[1][:, :37], values)


@pytest.mark.parametrize("name", ["fast", "reference"])
@pytest.mark.parametrize(
    ("positions", "pages", "message"),
    [([0, 500], [0, 1], "position 500"), ([0, 1], [0, 3], "page 3"), ([0, 1], [-1, 0], "page -1")],
)
def test_a_place_outside_the_cache_is_refused(
    name: str, positions: list[int], pages: list[int], message: str
) -> None:
    step = make_step(Shape(2, 1, 8, 8), [0, 1], torch.float32)
    recorded = CpuPlan(torch.float32) if name == "fast" else ReferencePlan(torch.float32)
    recorded.attention(step)
    step.positions_B.copy_(torch.tensor(positions))
    step.pages_BN.copy_(torch.tensor(pages)[:, None])
    before = step.cache.keys.clone()
    with pytest.raises(ValueError, match=message):
        recorded.run()
    assert torch.equal(step.cache.keys.nan_to_num(), before.nan_to_num())
    assert step.out_BHD.isnan().all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    recorded = new_plan("cpu", torch.float32)
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"out is torch.float32 of shape \[2, 3\]; it must be"):
        recorded.linears(x, [torch.zeros(4, 8)], [None], [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match=r"weight is torch.float32 with 9 input features"):
        recorded.linears(x, [torch.zeros(4, 9)], [None], [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="not contiguous"):
        recorded.linears(torch.zeros(8, 2).T, [torch.zeros(4, 8)], [None], [torch.zeros(2, 4)])
    with pytest.raises(ValueError, match=r"dtype torch.int8"):
        new_plan("cpu", torch.int8)
    step = make_step(Shape(2, 1, 8, 8), [0], torch.float32)
    with pytest.raises(ValueError, match="cosine has 3 positions; the pages have 16"):
        recorded.attention(replace(step, cosine_TR=torch.zeros(3, 8), sine_TR=torch.zeros(3, 8)))
    with pytest.raises(ValueError, match=r"positions is torch.int32"):
        recorded.attention(replace(step, positions_B=step.positions_B.int()))
    with pytest.raises(ValueError, match="head_size 300"):
        KeyValueCache.allocate(1, 1, 16, 300, torch.float32)
