"""Each linear of a block alone, beside cuBLAS and torch's 2:4 product, over weights in a ring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from cases import parse_case
from gpu_cases import (
    RANDOM,
    channel_norms,
    form,
    limits,
    random_inputs,
    random_weight,
    read_bytes,
)
from gpu_checks import check, product
from gpu_run import Case, Run, ring, seconds, spread
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu_selection, reference

LEAST_ROWS = 8  # of torch's semi-structured product


def bench_products(
    run: Run, read: float, batches: Sequence[int], cases: Sequence[Case], peer: bool
) -> None:
    """Each shape, batch and case beside the dense product.

    Args:
        read: bytes a second that were measured.
        peer: torch's 2:4 product as well.
    """
    for rows in batches:
        for name, shape in run.setting.shapes.items():
            if not run.has_time(f"products {name} at batch {rows}"):
                continue
            one = Linear(run, name, shape, rows, read)
            for case in cases:
                if run.has_time(f"product {name} {' '.join(case)} at batch {rows}"):
                    one.bench(case)
            if peer and run.has_time(f"torch 2:4 {name} at batch {rows}"):
                one.bench_2_of_4()


class Linear:
    """A shape at a batch, its dense product timed."""

    def __init__(self, run: Run, name: str, shape: tuple[int, int], rows: int, read: float) -> None:
        self.run, self.shape, self.rows, self.read = run, shape, rows, read
        self.about = {"kind": "product", "shape": name, "rows": rows}
        setting = run.setting
        norms_I = channel_norms(shape[1], RANDOM, setting.device)
        weight_OI = random_weight(shape[0], 0.0, norms_I, setting.dtype)
        x_BI = random_inputs(rows, norms_I, setting.dtype)
        many = [weight_OI.clone() for _ in range(ring(weight_OI.nbytes, setting))]
        times = seconds([partial(F.linear, x_BI, w) for w in many], setting)
        self.plain = statistics.median(times)
        limit = round(weight_OI.nbytes / read / self.plain, 3)
        run.add(**self.about, case="dense", **spread(times), bytes=weight_OI.nbytes, limit=limit)

    def bench(self, case: Case) -> None:
        (pruned, skipped), setting = parse_case(case[0]), self.run.setting
        norms_I = channel_norms(self.shape[1], case[1], setting.device)
        weight_OI = random_weight(self.shape[0], pruned, norms_I, setting.dtype)
        x_BI = random_inputs(self.rows, norms_I, setting.dtype)
        thresholds_B, stored = limits(x_BI, skipped), form(weight_OI, pruned)
        counted_BI = reference.counting(x_BI, thresholds_B, None)
        y_BO = product(x_BI, stored, thresholds_B, skipped)
        error = check(y_BO, torch.where(counted_BI, x_BI, 0), weight_OI, self._what(case))
        many = [replace(stored, data=stored.data.clone())
                for _ in range(ring(stored.nbytes, setting))]  # fmt: skip
        times = seconds(
            [partial(product, x_BI, w, thresholds_B, skipped) for w in many],
            setting,
        )
        loaded = read_bytes(stored, counted_BI.any(0))
        self._add(case, times, loaded, error)

    def bench_2_of_4(self) -> None:
        """Two of four kept at random, in copies that exceed the second cache; rows are padded."""
        setting, case = self.run.setting, ("torch 2:4", RANDOM)
        O, I = self.shape
        order_OI4 = torch.rand(O, I // 4, 4, device=setting.device).argsort(-1)
        norms_I = channel_norms(I, RANDOM, setting.device)
        weight_OI = random_weight(O, 0.0, norms_I, setting.dtype)
        weight_OI = torch.where((order_OI4 < 2).view(O, I), weight_OI, 0)
        x_BI = random_inputs(max(self.rows, LEAST_ROWS), norms_I, setting.dtype)
        try:
            one = gpu_selection.semi_structured(weight_OI)
            if one is None:
                return self.run.leave_out("torch 2:4: not on this device, dtype or shape")
            count = ring(O * I * 9 // 8, setting)  # two of four and their places
            many = [one] + [_semi_structured(weight_OI) for _ in range(count - 1)]
            y_BO = F.linear(x_BI, one)
            error = check(y_BO, x_BI, weight_OI, self._what(case))
            times = seconds([partial(F.linear, x_BI, w) for w in many], setting)
        except (Exception, SystemExit) as failure:  # a peer that fails is no reason to stop
            text = str(failure).splitlines()[0][:120] if str(failure) else ""
            return self.run.leave_out(f"torch 2:4: {type(failure).__name__} {text}")
        self._add(case, times, O * I * 9 // 8, error)

    def _what(self, case: Case) -> str:
        return f"{self.about['shape']} rows {self.rows} {' '.join(case)}"

    def _add(self, case: Case, times: list[float], loaded: int, error: float) -> None:
        middle = statistics.median(times)
        self.run.add(
            **self.about, case=case[0], masks=case[1], **spread(times),
            speedup=round(self.plain / middle, 3), bytes=loaded,
            limit=round(loaded / self.read / middle, 3), error=round(error, 3),
        )  # fmt: skip


def _semi_structured(weight_OI: Tensor) -> Tensor:
    found = gpu_selection.semi_structured(weight_OI)
    assert found is not None
    return found
