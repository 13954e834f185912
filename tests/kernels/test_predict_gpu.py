"""The prediction of a GPU's decoding: its arithmetic by hand, its bytes against packed weights, its
launches against plans, and the committed report against what the script writes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, reference

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "eval" / "reports" / "gpu_decode_predicted_2026-11-29"


@pytest.fixture(scope="module", autouse=True)
def beside_the_script() -> Iterator[None]:
    """The script's modules are found as they are when it is run."""
    sys.path.insert(0, str(ROOT / "kernels" / "bench"))
    yield
    sys.path.remove(str(ROOT / "kernels" / "bench"))


@pytest.fixture(scope="module")
def cases(beside_the_script: None) -> ModuleType:
    return importlib.import_module("gpu_cases")


@pytest.fixture(scope="module")
def model(beside_the_script: None) -> ModuleType:
    return importlib.import_module("gpu_prediction")


@pytest.fixture(scope="module")
def script(beside_the_script: None) -> ModuleType:
    return importlib.import_module("predict_gpu")


def test_a_product_is_its_slowest_resource_and_what_nothing_hides(model: ModuleType) -> None:
    # 1000 bytes a second, 2 multiprocessors of 1 clock a second with 8 instructions each
    device = model.Device(
        bandwidth=1000.0, multiprocessors=2, clock=1.0, issue=8, cache_bandwidth=40.0,
        memory=3.0, cache=0.5, gap=2.0, small=1.0,
    )  # fmt: skip
    counts = model.Counts(instructions=4.0, shared=2.0)
    one = model.Product(900, 40, counts, 0.5, 6, 1, 4.0, listed=True)
    reached = model.Reached(dense=0.5, memory=0.9, issue=0.8)
    # 900 / (1000 * 0.9); 40 * 4 / (8 * 2) / (0.8 * 0.5); 40 * 2 / (32 * 2) / 0.4
    assert one.bounds(device, reached) == pytest.approx(
        {"bytes": 1.0, "instructions": 25.0, "shared memory": 3.125}
    )
    assert one.stream(device, reached) == pytest.approx(25.0 + 4.0)
    # nine reads behind the first, eight at a time: two waits of 0.5
    assert model.improved({"a": one}, splits=10)["a"].finish(device) == pytest.approx(1.0 + 1.0)
    assert one.finish(device) == pytest.approx(1.0 + 0.6)  # 24 bytes of the cache take longer
    # the list with its gap, and two more gaps
    assert one.seconds(device, reached) == pytest.approx(3.0 + 4.0 + 29.0 + 1.6)
    # 6 splits of 100 sums of 4 bytes take 60 seconds of the cache
    wide = model.improved({"a": one}, outputs=100)["a"]
    assert wide.finish(device) == pytest.approx(1.0 + 60.0)
    # 10 * 20 weights of two bytes at half the bandwidth, and one read
    assert model.dense_stream((10, 20), 2, device, reached) == pytest.approx(0.8 + 3.0)


def test_a_step_is_its_gaps_its_small_kernels_and_its_products(model: ModuleType) -> None:
    device = model.Device(gap=2.0, small=1.0)
    launches = ["rms_norm", "list_channels", "packed_linear", "finish_linears", "attend", "mm"]
    found = model.step_seconds(launches, [10.0, 20.0], [5.0], 7.0, device)
    assert found == 6 * 2.0 + 3 * 1.0 + 30.0 + 5.0 + 7.0
    with pytest.raises(AssertionError):
        model.step_seconds(launches, [10.0], [5.0], 7.0, device)


def test_programs_are_dealt_to_the_least_busy(model: ModuleType) -> None:
    assert model.dealt([1] * 448, 132) == pytest.approx(448 / 132 / 4)
    assert model.dealt([3, 1, 1, 1], 2) == 1.0
    # gate+up: 56 blocks, 32 chunks, 2 of them a program
    device = model.Device()
    assert model.chunks_each(28672, 4096, device) == 2
    assert model.balance(28672, 4096, 2, device) == pytest.approx(896 / 132 / 7)
    assert model.balance(28672, 4096, 4, device) == pytest.approx(448 / 132 / 4)


def test_the_splits_are_those_that_are_launched(model: ModuleType) -> None:
    """As the partial sums of a small product have; the interpreter has 2 multiprocessors."""
    O, I = 1100, 700
    weight = gpu_layout.pack_channels(reference.pack(torch.randn(O, I).bfloat16()))
    sums_SBO = gpu.product_sums(torch.randn(1, I).bfloat16(), None, weight)
    device = model.Device(multiprocessors=gpu.multiprocessors(torch.device("cpu")))
    counts = model.Counts(9.0)
    found = model.product((O, I), 0, I, counts, False, False, device)
    assert found.splits == len(sums_SBO)
    assert found.positions == weight.tiles * weight.tile * I


def test_the_best_grid_is_never_slower(model: ModuleType) -> None:
    device, counts = model.Device(), model.Counts(9.0)
    for O, I in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        one = model.product((O, I), O * I, I, counts, False, False, device)
        best = model.best_grid(one, I, device, model.LIKELY)
        assert best.seconds(device, model.LIKELY) <= one.seconds(device, model.LIKELY)
        assert best == one or best.splits * -(-O // 512) >= 2 * device.multiprocessors


def touched(weight: ChannelWeight, active: list[int], piece: int) -> int:
    """Pieces of the segments and of the starts of the active channels, byte by byte."""
    assert weight.starts is not None
    starts, I = weight.starts.tolist(), weight.in_features
    data, places = set(), set()
    for tile in range(weight.tiles):
        for i in active:
            at = tile * I + i
            first, last = (units * gpu_layout.UNIT for units in starts[at : at + 2])
            data |= {byte // piece for byte in range(first, last)}
            places |= {byte // piece for byte in range(4 * at, 4 * at + 8)}
    return (len(data) + len(places)) * piece


@pytest.mark.parametrize("masks", ["random", "wanda"])
@pytest.mark.parametrize(("pruned", "skipped"), [(0.5, 0.5), (0.7, 0.0), (0.99, 0.8)])
def test_bytes_are_those_of_packed_segments(
    cases: ModuleType, masks: str, pruned: float, skipped: float
) -> None:
    norms_I = cases.channel_norms(90, masks)
    weight_OI = cases.random_weight(600, pruned, norms_I, torch.bfloat16)
    packed = gpu_layout.pack_channels(reference.pack(weight_OI))
    x_BI = cases.random_inputs(1, norms_I, torch.bfloat16)
    active_I = reference.counting(x_BI, cases.limits(x_BI, skipped), None)[0]
    active = active_I.nonzero()[:, 0].tolist()
    assert len(active) == 90 if not skipped else 0 < len(active) < 50
    exact = 0
    for first in (0, 512):  # a mask of 64 bytes, two bytes of each weight, up to whole units
        kept_I = (weight_OI[first : first + 512] != 0).sum(0)
        exact += sum(-(-(64 + 2 * int(kept_I[i])) // 16) * 16 for i in active)
    assert cases.read_bytes(packed, active_I) == exact
    assert cases.moved_bytes(packed, active_I) == touched(packed, active, 64)
    assert not cases.moved_bytes(packed, torch.zeros(90, dtype=torch.bool))


def test_wanda_keeps_more_of_the_channels_that_count(cases: ModuleType) -> None:
    torch.manual_seed(3)
    norms_I = cases.channel_norms(512, cases.WANDA)
    weight_OI = cases.random_weight(300, 0.5, norms_I, torch.bfloat16)
    assert ((weight_OI != 0).sum(1) == 256).all()  # of every row half
    x_BI = cases.random_inputs(1, norms_I, torch.bfloat16)
    active_I = x_BI[0].float().abs() > cases.limits(x_BI, 0.5)
    assert 252 <= active_I.sum() <= 256  # equal inputs are all skipped
    kept = (weight_OI[:, active_I] != 0).float().mean()
    assert 0.52 < kept < 0.65  # notes: 1.14 times as many as at random


def test_a_block_is_as_many_bytes_as_its_share_of_a_whole_weight(
    cases: ModuleType, script: ModuleType
) -> None:
    """Two blocks and a rest, packed at once: within the noise of their masks."""
    found = script.read((1200, 300), "W50A50", "random")
    torch.manual_seed(1)
    norms_I = cases.channel_norms(300, "random")
    packed = gpu_layout.pack_channels(
        reference.pack(cases.random_weight(1200, 0.5, norms_I, torch.bfloat16))
    )
    x_BI = cases.random_inputs(1, norms_I, torch.bfloat16)
    active_I = reference.counting(x_BI, cases.limits(x_BI, 0.5), None)[0]
    active = int(active_I.sum())
    assert {found.active, active} <= set(range(147, 151))  # equal inputs are all skipped
    each = cases.read_bytes(packed, active_I) / active
    assert found.loaded / found.active == pytest.approx(each, rel=0.02)
    assert found.loaded < found.moved < 1.2 * found.loaded


def test_launches_are_those_of_plans(script: ModuleType) -> None:
    block, end = script.launches(True, True)
    assert block.count("list_channels") == 3  # SwiGLU's last kernel makes the fourth
    assert block.count("packed_linear") == 4
    assert len(block) == 16 and end == ("rms_norm", "mm", "copy_")
    assert len(script.launches(True, False)[0]) == 13
    assert script.launches(False, False)[0].count("mm") == 4


def figures(value: Any, path: str = "") -> Iterator[tuple[str, float | str]]:
    """Every number and word of JSON with its place."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from figures(part, f"{path}.{key}")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from figures(part, f"{path}.{i}")
    else:
        yield path, value


def test_the_committed_report_is_what_the_script_writes(script: ModuleType, tmp_path: Path) -> None:
    """Where this fails the kernels have changed: run the script again, and read what it says."""
    script.main(["--out", str(tmp_path / "report")])
    written, committed = (
        dict(figures(json.loads(path.with_suffix(".json").read_text())))
        for path in (tmp_path / "report", REPORT)
    )
    assert written.keys() == committed.keys()
    for place, value in written.items():
        if isinstance(value, float | int) and not isinstance(value, bool):
            # masks of another torch's random numbers; two decimals
            assert committed[place] == pytest.approx(value, rel=0.01, abs=0.011), place
        elif not place.endswith((".met", ".bound")):
            assert committed[place] == value, place


def test_the_page_says_what_its_figures_say(script: ModuleType) -> None:
    result = json.loads(REPORT.with_suffix(".json").read_text())
    page = REPORT.with_suffix(".md").read_text()
    assert page == "\n".join(script.markdown(result)) + "\n"
    for row in result["blocks"] + result["steps"]:
        assert row["met"] == (row["speedup"] >= row["target"])
        assert row["low"] <= row["speedup"] <= row["high"] <= row.get("ceiling", 9)
    assert "nothing measured" in page and "missed" in page
