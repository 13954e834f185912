"""Norm, SwiGLU's product and attention of the GPU in Triton's interpreter, against float64.

Memory that must not count is NaN: outputs before they are written, places of the cache that no
query may see. The interpreter rounds float32 to bfloat16 towards zero, which a GPU does not.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import gpu, gpu_step, gpu_triton_step
from prune_llm_kernels.gpu_plan import GpuPlan
from prune_llm_kernels.kv_cache import LANES, KeyValueCache
from prune_llm_kernels.plan import AttentionStep
from prune_llm_kernels.reference_plan import attend, rms_norm, rotate, silu_mul

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")
PAGE, COLUMNS = 32, 3  # tokens of a page, pages of a row


@pytest.fixture(autouse=True)
def seed() -> None:
    value = random.SystemRandom().randrange(2**31)
    torch.manual_seed(value)
    print(f"torch.manual_seed({value})")  # shown when the test fails


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding, and of float32 arithmetic."""
    return torch.finfo(dtype).eps * (0.51 if dtype is torch.float16 else 1.0) + 4e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (3, 300), (2, 3, 80), (2, 512)], ids=str)
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    exact = rms_norm(x.double(), weight, 1e-5)
    out = torch.full(shape, NAN).to(dtype)
    gpu_step.rms_norm(x, weight, 1e-5, out)
    assert ((out.double() - exact).abs() <= unit(dtype) * exact.abs() + 1e-7).all()
    gpu_step.rms_norm(x, weight, 1e-5, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (3, 700)], ids=str)
def test_silu_mul(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = (4 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    exact = silu_mul(gate.double(), up.double())
    out = torch.full(shape, NAN).to(dtype)
    gpu_step.silu_mul(gate, up, out)
    assert ((out.double() - exact).abs() <= unit(dtype) * exact.abs() + 1e-7).all()
    gpu_step.silu_mul(gate, up, up)
    assert torch.equal(up, out)


def make_step(
    tables: list[list[int]],
    positions: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    window: int = 0,
    rotated: int | None = None,
) -> AttentionStep:
    """Random queries, and a cache of random tokens: NaN where no row of the step may look."""
    B, (H, K, D) = len(tables), heads
    cache = KeyValueCache.allocate(9, K, PAGE, D, dtype)
    cache.keys.fill_(NAN)
    cache.values.fill_(NAN)
    for table, position in zip(tables, positions, strict=True):
        first = max(position + 1 - window, 0) if window else 0
        for token in range(first, position):
            new = torch.randn(2, K, 1, D).to(dtype)
            cache.write(table[token // PAGE], token % PAGE, new[0], new[1])
    q, k, v = (torch.randn(B, n, D).to(dtype) for n in (H, K, K))
    angles = torch.rand(COLUMNS * PAGE, D - D % 2 if rotated is None else rotated) * 6
    out = torch.full((B, H, D), NAN).to(dtype)
    return AttentionStep(
        q, k, v, out, angles.cos(), angles.sin(), cache, torch.tensor(tables),
        torch.tensor(positions), D**-0.5, window,
    )  # fmt: skip


def expected(step: AttentionStep) -> tuple[Tensor, KeyValueCache]:
    """In float64, over tokens rounded as they are stored: out and the cache after the step."""
    cache = KeyValueCache(step.cache.keys.clone(), step.cache.values.clone(), step.cache.head_size)
    out_BHD = torch.zeros_like(step.out_BHD, dtype=torch.float64)
    live = [(b, p) for b, p in enumerate(step.positions_B.tolist()) if p >= 0]
    for b, p in live:
        angles = step.cosine_TR[p][None].double(), step.sine_TR[p][None].double()
        k_KD = rotate(step.k_BKD[b][None].double(), *angles)[0]
        page = int(step.pages_BN[b, p // PAGE])
        cache.write(page, p % PAGE, k_KD.to(cache.keys.dtype)[:, None], step.v_BKD[b][:, None])
    for b, p in live:
        angles = step.cosine_TR[p][None].double(), step.sine_TR[p][None].double()
        q_HD = rotate(step.q_BHD[b][None].double(), *angles)[0].to(step.q_BHD.dtype).double()
        pages = step.pages_BN[b, : p // PAGE + 1].tolist()
        out_BHD[b] = attend(q_HD, *cache.read(pages, p + 1), step.scale, step.window)
    return out_BHD, cache


def check(step: AttentionStep) -> None:
    exact_BHD, cache = expected(step)
    dtype = step.out_BHD.dtype
    # rounded: the query, the new key, the result; NaN is where it was and nowhere else
    most = 4 * torch.finfo(dtype).eps + 1e-5
    gpu_step.attention(step, len(step.positions_B))
    for found, wanted in (
        (step.out_BHD, exact_BHD),
        (step.cache.keys, cache.keys),
        (step.cache.values, cache.values),
    ):
        torch.testing.assert_close(
            found.double(), wanted.double(), rtol=most, atol=most, equal_nan=True
        )
    assert torch.equal(step.cache.values.isnan(), cache.values.isnan())
    assert step.out_BHD.isfinite().all()
    left_out = step.positions_B < 0
    assert (step.out_BHD[left_out] == 0).all()


TABLES = [[3, 0, -1], [5, 1, 7], [2, 99, -1], [4, 6, 8]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads", [(2, 2, 8), (6, 2, 64), (7, 1, 80), (4, 4, 128), (3, 1, 128), (9, 1, 9)], ids=str
)
def test_attention(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    check(make_step(TABLES, [33, 95, 0, -1], heads, dtype))


@pytest.mark.parametrize("window", [1, 3, 16, 40])
@pytest.mark.parametrize("positions", [[15, 16, 31, 32], [-1, 64, 17, 95], [0, 1, 14, 63]])
def test_windows_and_the_edges_of_pages(window: int, positions: list[int]) -> None:
    check(make_step(TABLES, positions, (3, 1, 8), torch.float32, window))


def test_several_tokens_of_one_sequence() -> None:
    """Every one sees those before it in the same step, whatever their order in the batch."""
    tables = [[3, 0, 5]] * 3
    check(make_step(tables, [31, 33, 32], (4, 2, 16), torch.float32))


def test_part_of_a_head_turns() -> None:
    for rotated in (0, 4, 10):
        check(make_step(TABLES, [33, 95, 0, -1], (2, 1, 16), torch.float32, rotated=rotated))


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_any_number_of_splits(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: processors)
    step = make_step(TABLES, [33, 95, 0, 70], (6, 2, 16), torch.float32)
    check(step)
    first = step.out_BHD.clone()
    step.q_BHD.copy_(torch.randn_like(step.q_BHD))
    queries = step.q_BHD.clone()
    results = []
    for _ in range(2):
        step.q_BHD.copy_(queries)
        gpu_step.attention(step, 4)
        results.append(step.out_BHD.clone())
    assert torch.equal(*results) and not torch.equal(first, results[0])


def test_rows_past_the_run_are_left_alone() -> None:
    step = make_step(TABLES, [33, 95, 0, 5], (2, 1, 8), torch.float32)
    queries, keys = step.q_BHD.clone(), step.cache.keys.clone()
    gpu_step.attention(step, 3)
    assert torch.equal(step.q_BHD[3], queries[3]) and step.out_BHD[3].isnan().all()
    assert torch.equal(step.cache.keys[[4, 6, 8]].nan_to_num(9), keys[[4, 6, 8]].nan_to_num(9))


def test_a_row_behind_its_pages_is_nan_and_writes_nothing() -> None:
    step = make_step(TABLES, [-1, -1, -1, -1], (2, 1, 8), torch.float32)
    step.positions_B[1] = COLUMNS * PAGE
    gpu_step.attention(step, 4)
    assert step.out_BHD[1].isnan().all() and (step.out_BHD[[0, 2, 3]] == 0).all()
    assert step.cache.keys.isnan().all() and step.cache.values.isnan().all()


@pytest.mark.parametrize(("programs", "blocks"), [(8, 128), (1, 8192), (2000, 128), (8, 1)])
def test_splits_fill_the_multiprocessors(programs: int, blocks: int) -> None:
    splits = gpu_step.splits_for(programs, blocks, 132)
    assert 1 <= splits <= min(blocks, gpu_step.MOST_SPLITS)
    assert splits in (blocks, gpu_step.MOST_SPLITS) or splits * programs >= 8 * 132


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """The kernels and torch operations that a plan issues, in their order, by name.

    Views and memory without contents are no work of the device.
    """

    IDLE = ("view", "slice", "select", "empty", "new_empty", "unbind", "detach", "alias", "t",
            "as_strided", "_unsafe_view", "split", "transpose", "unsqueeze", "expand")  # fmt: skip

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        super().__init__()
        self.names: list[str] = []
        for module in modules:
            for _name, kernel in vars(module).items():
                if hasattr(kernel, "__getitem__") and hasattr(kernel, "arg_names"):
                    monkeypatch.setattr(type(kernel), "__getitem__", self.counted(type(kernel)))

    def counted(self, kernel_type: Any) -> Callable[[Any, Any], Callable[..., None]]:
        """Kernels of a launched grid are named; they do not run."""
        return lambda kernel, grid: lambda *args, **sizes: self.names.append(kernel.fn.__name__)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in self.IDLE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_launches_between_the_linears_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Llama block: two norms, three launches of attention, SwiGLU's product."""
    step = make_step([[3, 0, 5]], [40], (4, 2, 16), torch.float32)
    x, normed, gate, up = (torch.randn(1, 64) for _ in range(4))
    plan = GpuPlan(torch.float32)
    plan.rms_norm(x, torch.ones(64), 1e-5, normed)
    plan.attention(step)
    plan.rms_norm(x, torch.ones(64), 1e-5, normed)
    plan.silu_mul(gate, up, gate)
    with Launches(monkeypatch, gpu_triton_step) as launches:
        plan.replay(1)
    attention = ["rotate_and_store", "attend", "combine"]
    found = [name for name in launches.names if name != "fill_"]  # poisoned scratch memory
    assert found == ["rms_norm", *attention, "rms_norm", "silu_mul"]
    assert LANES == 16
