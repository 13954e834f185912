"""The Gram matrix and causal attention against float64, on shapes that fit nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from prune_llm_kernels import _C, cpu, reference_plan, tokens

BF16 = torch.bfloat16


def _sets_with(has: Callable[[int], bool], reason: str) -> list[Any]:
    found = [name for index, name in enumerate(cpu.isa_names()) if has(index)]
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=reason))]


@pytest.fixture(params=_sets_with(_C.has_gram, "this machine has no AVX-512 BF16"))
def with_gram(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each instruction set of this machine that multiplies Gram matrices, chosen or not."""
    yield from _chosen(request.param, monkeypatch)


@pytest.fixture(params=_sets_with(_C.has_attention, "this machine has no AVX2"))
def with_attention(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    yield from _chosen(request.param, monkeypatch)


def _chosen(isa: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PRUNE_LLM_ISA", isa)
    cpu.isa_index.cache_clear()
    yield
    cpu.isa_index.cache_clear()


needs_kernels = pytest.mark.usefixtures("with_gram")
needs_attention = pytest.mark.usefixtures("with_attention")


@needs_kernels
@pytest.mark.parametrize("width", [1, 7, 47, 48, 49, 97, 200, 1030])
@pytest.mark.parametrize("count", [1, 2, 33, 517, 1100])
def test_gram_equals_float64(count: int, width: int) -> None:
    x = torch.randn(count, width).to(BF16)
    start = torch.randn(width, width)
    total = start.clone()
    tokens.gram_add(total, x)
    exact = x.double().T @ x.double()
    added = (total.double() - start.double()).tril()
    # float32 sums of `count` exact products, and of the start
    assert (added - exact.tril()).abs().max() <= 2e-6 * (exact.abs().max() + start.abs().max())


@needs_kernels
def test_gram_does_not_depend_on_threads() -> None:
    x = torch.randn(300, 331).to(BF16)
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total = torch.zeros(331, 331)
            tokens.gram_add(total, x)
            sums.append(total.tril())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(sums[0], other) for other in sums)


@needs_kernels
def test_gram_of_a_view() -> None:
    wide = torch.randn(40, 130).to(BF16)
    total, expected = torch.zeros(60, 60), torch.zeros(60, 60)
    tokens.gram_add(total, wide[::2, 10:70])
    tokens.gram_add(expected, wide[::2, 10:70].contiguous())
    assert torch.equal(total.tril(), expected.tril())


@needs_kernels
@pytest.mark.parametrize(
    ("total", "x", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4, dtype=BF16), r"it must be torch.float32 \[4, 4\]"),
        (torch.zeros(4, 4).double(), torch.zeros(2, 4, dtype=BF16), "sum is torch.float64"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(2, 4, dtype=BF16), "not contiguous"),
        (torch.zeros(4, 4), torch.zeros(2, 4), "x is torch.float32"),
    ],
)
def test_gram_refuses(total: torch.Tensor, x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens.gram_add(total, x)


@needs_kernels
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 130), (48, 49), (97, 47), (1030, 200)])
@pytest.mark.parametrize("count", [1, 2, 33, 517, 1100])
def test_cross_equals_float64(count: int, height: int, width: int) -> None:
    a, b = torch.randn(count, height).to(BF16), torch.randn(count, width).to(BF16)
    start = torch.randn(height, width)
    total = start.clone()
    tokens.cross_add(total, a, b)
    exact = a.double().T @ b.double()
    scale = max(float(exact.abs().max()), count**0.5) + start.abs().max()
    assert (total.double() - start.double() - exact).abs().max() <= 2e-6 * scale


@needs_kernels
def test_cross_of_views_with_any_number_of_threads() -> None:
    wide = torch.randn(300, 331).to(BF16)
    before = torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            total = torch.zeros(100, 90)
            tokens.cross_add(total, wide[::2, :100], wide[1::2, 5:95])
            sums.append(total)
    finally:
        torch.set_num_threads(before)
    expected = wide[::2, :100].float().T @ wide[1::2, 5:95].float()
    assert all(torch.equal(sums[0], other) for other in sums)
    torch.testing.assert_close(sums[0], expected)


@needs_kernels
@pytest.mark.parametrize(
    ("total", "a", "b", "message"),
    [
        (
            torch.zeros(4, 3),
            torch.zeros(2, 3, dtype=BF16),
            torch.zeros(2, 4, dtype=BF16),
            r"it must be torch.float32 \[3, 4\]",
        ),
        (
            torch.zeros(3, 4),
            torch.zeros(2, 3, dtype=BF16),
            torch.zeros(5, 4, dtype=BF16),
            "a has 2 tokens and b 5",
        ),
        (torch.zeros(3, 4), torch.zeros(2, 3), torch.zeros(2, 4, dtype=BF16), "a is torch.float32"),
        (torch.zeros(3, 4), torch.zeros(2, 3, dtype=BF16), torch.zeros(2, 4), "b is torch.float32"),
    ],
)
def test_cross_refuses(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens.cross_add(total, a, b)


SHAPES = [
    (1, 1, 1, 1, 2),
    (1, 2, 1, 7, 16),
    (2, 4, 2, 100, 64),
    (1, 3, 3, 65, 80),
    (3, 8, 2, 130, 128),
    (1, 2, 2, 333, 256),
    (2, 6, 1, 64, 10),
]


@needs_attention
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_as_exact_as_torch(shape: tuple[int, int, int, int, int]) -> None:
    samples, heads, kv_heads, count, size = shape
    # projected [B, T, H, D] and transposed, as models hold them; some scores are large
    q = (4 * torch.randn(samples, count, heads, size)).to(BF16).transpose(1, 2)
    k = torch.randn(samples, count, kv_heads, size).to(BF16).transpose(1, 2)
    v = torch.randn(samples, count, kv_heads, size).to(BF16).transpose(1, 2)
    assert tokens.supports_causal_attention(q, k, v)
    ours = tokens.causal_attention(q, k, v, size**-0.5)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True
    )
    assert ours.shape == theirs.shape and ours.dtype == BF16
    bound = 2 * (theirs.double() - exact).abs().max() + 2**-8 * exact.abs().max() / 256
    assert (ours.double() - exact).abs().max() <= bound


@needs_attention
def test_attention_sees_no_later_token_and_does_not_depend_on_threads() -> None:
    q, k, v = (torch.randn(2, 3, 90, 32).to(BF16) for _ in range(3))
    whole = tokens.causal_attention(q, k, v, 0.2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(tokens.causal_attention(q, k, v, 0.2), whole)
    finally:
        torch.set_num_threads(before)
    k[:, :, 50:], v[:, :, 50:] = 99.0, -1e4
    assert torch.equal(tokens.causal_attention(q, k, v, 0.2)[:, :, :50], whole[:, :, :50])


@needs_attention
def test_attention_refuses_what_it_cannot_do() -> None:
    good = torch.randn(1, 2, 8, 16).to(BF16)
    for bad in (good.float(), good[..., :15], good[:, :, :5], torch.randn(1, 3, 8, 16).to(BF16)):
        assert not tokens.supports_causal_attention(good, bad, bad)
        with pytest.raises(ValueError, match="not supported"):
            tokens.causal_attention(good, bad, bad, 1.0)


def test_reference_backend_leaves_the_work_to_torch() -> None:
    code = (
        "import torch; from prune_llm_kernels import tokens; "
        "print(tokens.kernel_name(torch.device('cpu'), torch.bfloat16))"
    )
    env = {**os.environ, "PRUNE_LLM_BACKEND": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch"


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    form = torch.finfo(found.dtype)
    allowed = 2 * form.eps * exact.abs() + 3e-6 * exact.abs().max()
    allowed += form.smallest_normal * form.eps
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_small_operations_over_many_tokens(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    x, weight = torch.randn(3, 17, 50).to(dtype), torch.randn(50).to(dtype)
    exact = reference_plan.rms_norm(x.double(), weight, 1e-6)
    assert_rounded(tokens.rms_norm(x, weight, 1e-6), exact)
    gate, up = torch.randn(9, 5000).to(dtype), torch.randn(9, 5000).to(dtype)
    exact = reference_plan.silu_mul(gate.double(), up.double())
    assert_rounded(tokens.silu_mul(gate, up), exact)
    total = torch.rand(700).double()
    x = (torch.randn(333, 700) * 3).to(dtype)
    exact = total + x.double().square().sum(0)
    tokens.add_squares(total, x)
    assert ((total - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2, 2), (2, 5, 3, 10, 4), (1, 40, 4, 64, 64)], ids=str)
def test_rotated_heads(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    B, T, H, D, R = shape
    wide = torch.randn(B, T, H * D + 6).to(dtype)
    x_BTHD = wide[..., : H * D].unflatten(-1, (H, D))  # tokens at a stride of their own
    angles = torch.rand(T, R) * 6
    found = tokens.rotate_heads(x_BTHD, angles.cos(), angles.sin())
    assert found.is_contiguous() and found.shape == (B, H, T, D)
    for b in range(B):
        exact = reference_plan.rotate(x_BTHD[b].double(), angles.cos().double(), angles.sin())
        assert_rounded(found[b].transpose(0, 1), exact)
    moved = tokens.rotate_heads(x_BTHD, angles[:, :0], angles[:, :0])
    assert torch.equal(moved, x_BTHD.transpose(1, 2))


def test_small_operations_refuse_what_does_not_fit() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"weight is torch.float32 of shape \[7\]"):
        tokens.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match=r"up is torch.bfloat16"):
        tokens.silu_mul(x, x.bfloat16())
    with pytest.raises(ValueError, match=r"sum is torch.float32"):
        tokens.add_squares(torch.zeros(8), x)
    with pytest.raises(ValueError, match=r"cosine \[3, 8\]"):
        tokens.rotate_heads(x.view(1, 4, 1, 8), torch.zeros(3, 8), torch.zeros(3, 8))
