"""Linears of a GPU's plan in Triton's interpreter: weights that lie together, every ending."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, reference
from prune_llm_kernels.channel_weight import _dense_channels
from prune_llm_kernels.gpu_linears import Input, Linears, SwiGLU, parts
from prune_llm_kernels.plan import Gate

DTYPE = torch.float32
I = 150  # two chunks, the second ragged
FORMS = ["packed", "dense"]


def make(O: int, form: str, columns: int = I) -> tuple[Tensor, ChannelWeight]:
    dense = torch.where(torch.rand(O, columns) < 0.5, torch.randn(O, columns), 0).to(DTYPE)
    if form == "dense":
        return dense, _dense_channels(dense, 256)
    return dense, gpu_layout.pack_channels(reference.pack(dense), 256)


def together(widths: tuple[int, ...], form: str) -> tuple[list[Tensor], list[ChannelWeight]]:
    made = [make(O, form) for O in widths]
    return [d for d, _ in made], list(gpu_layout.lay_together([w for _, w in made]))


def poisoned(rows: int, widths: tuple[int, ...]) -> list[Tensor]:
    return [torch.full((rows, O), float("nan"), dtype=DTYPE) for O in widths]


def assert_close(found: Tensor, exact: Tensor) -> None:
    assert (found.double() - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", [(512, 256, 256), (256, 70), (256, 256, 1)], ids=str)
def test_weights_laid_together_stay_what_they_are(widths: tuple[int, ...], form: str) -> None:
    dense, weights = together(widths, form)
    for one, weight in zip(dense, weights, strict=True):
        assert torch.equal(gpu_layout.unpack_channels(weight), one)
        if form == "packed":
            assert torch.equal(gpu_layout.channel_keep_mask(weight), one != 0)
    whole = gpu_layout.joined(weights)
    assert whole is not None
    assert torch.equal(gpu_layout.unpack_channels(whole), torch.cat(dense))
    # each is one of its own, and any that are neighbours
    assert gpu_layout.joined(weights[1:2]) is weights[1]
    assert gpu_layout.joined(weights[::-1]) is None
    again = gpu_layout.lay_together(weights)
    assert torch.equal(gpu_layout.unpack_channels(again[-1]), dense[-1])


def test_weights_that_cannot_lie_together_stay_as_they_are() -> None:
    (_, narrow), (_, other) = make(70, "packed"), make(256, "packed")
    _, fewer = make(256, "packed", columns=60)
    _, dense = make(256, "dense")
    for weights in ([narrow, other], [other, fewer], [other, dense]):
        found = gpu_layout.lay_together(weights)
        assert all(a is b for a, b in zip(found, weights, strict=True))
        assert gpu_layout.joined(weights) is None
    assert gpu_layout.joined([make(256, "dense")[1], make(256, "dense")[1]]) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 16, 19])
@pytest.mark.parametrize("accumulate", [False, True])
def test_every_linear_gets_its_own_result(form: str, rows: int, accumulate: bool) -> None:
    widths = (256, 256, 40)
    dense, weights = together(widths, form)
    x = torch.randn(20, I, dtype=DTYPE)
    biases = [torch.randn(256), None, torch.randn(40)]
    outs = poisoned(20, widths)
    before = [torch.randn(20, O, dtype=DTYPE) for O in widths]
    thresholds, scales, counts = torch.rand(20), torch.rand(I) + 0.5, torch.zeros(3).long()
    thresholds[0], thresholds[1] = -1, torch.inf
    for gate in (None, Gate(thresholds, scales, counts)):
        for out, old in zip(outs, before, strict=True):
            out[:rows] = old[:rows] if accumulate else float("nan")
        linears = Linears(Input(x, gate), parts(weights, biases, outs), accumulate)
        assert len(linears.groups) == 1
        linears(rows)
        kept = x if gate is None else torch.where(reference.counting(x, thresholds, scales), x, 0)
        for weight, bias, out, old in zip(dense, biases, outs, before, strict=True):
            exact = F.linear(kept.double(), weight.double())
            exact += 0 if bias is None else bias.double()
            exact += old.double() if accumulate else 0
            assert_close(out[:rows], exact[:rows])
            assert out[rows:].isnan().all()
    counted = reference.counting(x, thresholds, scales)[:rows]
    live = int((thresholds[:rows] < torch.inf).sum())
    assert counts.tolist() == [int(counted.any(0).sum()), int(counted.sum()), live]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 4, 18])
@pytest.mark.parametrize("joined", [True, False])
def test_gate_up_and_what_reads_them(form: str, rows: int, joined: bool) -> None:
    width = 256
    dense, weights = together((width, width), form)
    if not joined:
        weights = [gpu_layout.lay_together([w])[0] for w in (weights[0], make(1, form)[1])][:1]
        dense, weights = dense[:1] * 2, weights * 2
    down, down_weight = make(30, form, columns=width)
    x, hidden = torch.randn(20, I, dtype=DTYPE), poisoned(20, (width, width, width))
    biases = [torch.randn(width), None]
    into, out = Gate(torch.rand(20)), poisoned(20, (30,))[0]
    counts = torch.zeros(3).long()
    after = Gate(torch.rand(20) * 3, torch.rand(width) + 0.5, counts)
    swiglu = SwiGLU(Linears(Input(x, into), parts(weights, biases, hidden[:2]), False), hidden[2])
    swiglu.following = Input(hidden[2], after)
    read = Linears(swiglu.following, parts([down_weight], [None], [out]), False)
    for count in (rows, max(1, rows - 1)):  # a list of one run is not used by the next
        counts.zero_()
        swiglu(count)
        assert (swiglu.following.listed is not None) == (joined and rows <= gpu.MAX_ROWS)
        read(count)
        kept = torch.where(reference.counting(x, into.thresholds_B, None), x, 0).double()
        gate, up = (F.linear(kept, weight.double()) for weight in dense)
        product = F.silu(gate + biases[0].double()) * up  # type: ignore[union-attr]
        assert_close(hidden[2][:count], product[:count])
        thresholds = after.thresholds_B[:count]
        counted = reference.counting(hidden[2][:count], thresholds, after.scales_I)
        exact = F.linear(torch.where(counted, hidden[2][:count], 0).double(), down.double())
        assert_close(out[:count], exact)
        assert counts.tolist() == [int(counted.any(0).sum()), int(counted.sum()), count]
