"""Every kernel and the whole decode step against float64, before anything is timed.

A result may be wrong by twice what torch's own of the same dtype is, and by one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import parse_case
from gpu_cases import (
    RANDOM,
    WANDA,
    Sizes,
    channel_norms,
    form,
    limits,
    random_inputs,
    random_weight,
)
from gpu_decoder import SITES, Decoder, random_layer
from gpu_peer import Peer
from gpu_records import kept_inputs, recorded_lists
from gpu_run import Run, Setting
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import ChannelWeight, gpu, reference

STEPS = ("W0", "A50", "W50", "W50A50")  # whose decode step is checked


def product(x_BI: Tensor, weight: ChannelWeight, thresholds_B: Tensor, skipped: float) -> Tensor:
    """As a linear of a loaded model multiplies alone: with its list where it skips."""
    if not skipped:
        return gpu.channel_linear(x_BI, weight, None)
    return gpu.listed_linear(gpu.list_channels(x_BI, thresholds_B, None), weight, None)


def compare(y: Tensor, plains: Sequence[Tensor], exact: Tensor, what: str) -> float:
    """Our largest error over torch's, of its results the worst. Stops the run where it is more
    than twice torch's."""
    ours, *others = (float((found.double() - exact).abs().max()) for found in (y, *plains))
    theirs = max(others)
    unit = torch.finfo(y.dtype).eps * float(exact.abs().max())
    if not ours <= 2 * theirs + unit:
        raise SystemExit(f"{what}: wrong by {ours:.3g}, torch by {theirs:.3g}: nothing is timed")
    return ours / max(theirs, unit)


def check(y: Tensor, x: Tensor, weight: Tensor, what: str) -> float:
    """Of a product; torch's sums depend on the order of the weight in memory."""
    plains = [F.linear(x, order) for order in (weight, weight.T.contiguous().T)]
    return compare(y, plains, F.linear(x.double(), weight.double()), what)


def check_kernels(run: Run) -> None:
    """Odd shapes and new inputs; the same bits twice; no output left out."""
    setting, checks = run.setting, 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        for O, I in ((33, 131), (700, 384)) if setting.on_gpu else ((33, 70),):
            for rows in setting.batches:
                for pruned, skipped in ((0.5, 0.0), (0.5, 0.5), (0.9, 0.9), (0.0, 0.5)):
                    if run.has_time(f"checks of {O}x{I}, {rows} rows"):
                        check_product((O, I), rows, pruned, skipped, setting)
                        checks += 1
                for pruned, skipped in ((0.5, 0.5), (0.0, 0.5)):
                    if run.has_time(f"checks of SwiGLU of {O}x{I}, {rows} rows"):
                        check_swiglu((O, I), rows, pruned, skipped, setting)
                        checks += 1
    finally:
        torch.use_deterministic_algorithms(False)
    for case in STEPS:
        if run.has_time(f"check of the step {case}"):
            check_step(case, setting)
            checks += 1
    run.add(kind="check", checks=checks)


def check_product(
    shape: tuple[int, int], rows: int, pruned: float, skipped: float, setting: Setting
) -> None:
    what = f"{shape[0]}x{shape[1]} rows {rows} {pruned} {skipped}"
    norms_I = channel_norms(shape[1], WANDA, setting.device)
    weight_OI = random_weight(shape[0], pruned, norms_I, setting.dtype)
    x_BI = random_inputs(rows, norms_I, setting.dtype)
    thresholds_B, stored = limits(x_BI, skipped), form(weight_OI, pruned)
    y_BO = product(x_BI, stored, thresholds_B, skipped)
    counted_BI = reference.counting(x_BI, thresholds_B, None)
    check(y_BO, torch.where(counted_BI, x_BI, 0), weight_OI, what)
    if not torch.equal(y_BO, product(x_BI, stored, thresholds_B, skipped)):
        raise SystemExit(f"{what}: two runs differ")
    if pruned and not torch.equal(gpu.dense_columns(stored)[:, : shape[0]].T, weight_OI):
        raise SystemExit(f"{what}: unpacking is not exact")


def check_swiglu(
    shape: tuple[int, int], rows: int, pruned: float, skipped: float, setting: Setting
) -> None:
    """Gate, up and SiLU over a list, and the list that they make for what reads them."""
    O, I = shape
    what = f"SwiGLU {O}x{I} rows {rows} {pruned} {skipped}"
    norms_I = channel_norms(I, WANDA, setting.device)
    weight_OI = random_weight(2 * O, pruned, norms_I, setting.dtype)
    x_BI = random_inputs(rows, norms_I, setting.dtype)
    thresholds_B, following_B = limits(x_BI, skipped), torch.full_like(x_BI[:, 0].float(), 0.1)
    channels = gpu.list_channels(x_BI, thresholds_B, None)
    stored = form(weight_OI, pruned)
    y_BO, listed = gpu.listed_swiglu(channels, stored, None, following_B, None)
    kept_BI = torch.where(reference.counting(x_BI, thresholds_B, None), x_BI, 0)
    halves = [F.linear(kept_BI.to(w.dtype), w).chunk(2, -1)
              for w in (weight_OI.double(), weight_OI, weight_OI.T.contiguous().T)]  # fmt: skip
    exact, *plains = (F.silu(gate) * up for gate, up in halves)
    compare(y_BO, plains, exact, what)
    assert listed is not None
    again = gpu.list_channels(y_BO, following_B, None)
    check_list(listed, y_BO, following_B, what)
    check_list(again, y_BO, following_B, what)


def check_list(channels: gpu.ChannelList, x_BI: Tensor, limits_B: Tensor, what: str) -> None:
    """The channels that count and their inputs, exactly."""
    counted_BI = reference.counting(x_BI, limits_B, None)
    found_BI, listed_I = kept_inputs(channels)
    inputs_BI = torch.where(counted_BI, x_BI, 0)
    if not (torch.equal(listed_I, counted_BI.any(0).cpu()) and torch.equal(found_BI, inputs_BI)):
        raise SystemExit(f"{what}: the list is not that of the channels that count")


def check_step(case: str, setting: Setting) -> None:
    """The logits of a plan over grouped heads, an old cache and two rows, against float64.

    An input beside its threshold may count in one precision and not in another: torch and float64
    count what the plan did, and say how far from the threshold they would have differed.
    """
    (pruned, skipped), sizes = parse_case(case), setting.checked
    layers = [random_layer(sizes, pruned, RANDOM, setting.dtype, setting.device)]
    head_VI = random_head(sizes, setting)
    thresholds_SB = None
    if skipped:
        sites = len(SITES) * sizes.layers
        thresholds_SB = torch.full((sites, 2), 0.3, device=setting.device)
    decoder = Decoder(sizes, layers, head_VI, 40, 2, thresholds_SB)
    plain, exact = Peer(decoder), Peer(decoder)
    x_BI = torch.randn_like(decoder.x_BI)
    decoder.x_BI.copy_(x_BI)
    with recorded_lists() as lists:
        decoder.plan.run()
    kept = [kept_inputs(channels)[0] != 0 for channels in lists]
    plain, exact = (one.counting(kept) for one in (plain, exact))
    with torch.no_grad():
        plains = [plain(x_BI), plain.in_channel_order()(x_BI)]
        exact_BV = exact.double()(x_BI.double())
    compare(decoder.logits_BV, plains, exact_BV, f"step {case}")
    eps = torch.finfo(setting.dtype).eps
    if exact.farthest > 32 * eps:  # inputs are of size 1
        raise SystemExit(f"step {case}: counts an input {exact.farthest:.3g} from its threshold")


def random_head(sizes: Sizes, setting: Setting) -> Tensor:
    norms_I = channel_norms(sizes.hidden, RANDOM, setting.device)
    return random_weight(sizes.vocabulary, 0.0, norms_I, setting.dtype)
