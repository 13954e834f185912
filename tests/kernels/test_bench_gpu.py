"""The GPU benchmark from beginning to end, tiny and interpreted: typos show before a GPU does.

And that it refuses: every kernel that is made wrong stops it before anything is timed.
"""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, gpu_selection, gpu_step
from prune_llm_kernels.gpu_plan import GpuPlan

FOLDER = Path(__file__).parents[2] / "kernels" / "bench"
MODULES = (
    "bench_gpu", "gpu_cases", "gpu_checks", "gpu_decoder", "gpu_peer", "gpu_products",
    "gpu_records", "gpu_report", "gpu_run", "gpu_steps",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The script and its modules by name, found as they are when it is run."""
    sys.path.insert(0, str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def dry(bench: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What a dry run writes: the JSON and the page."""
    out = tmp_path_factory.mktemp("dry") / "gpu"
    bench.bench_gpu.main(["--dry-run", "--out", str(out)])
    return json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()


def new_run(bench: SimpleNamespace, **changes: Any) -> Any:
    setting = replace(bench.gpu_run.DRY, **changes)
    return bench.gpu_run.Run(setting, time.monotonic() + 100, {"device": "none"})


def test_a_dry_run_goes_through_every_section(dry: tuple[Any, str]) -> None:
    found, page = dry
    products = [row for row in found["rows"] if row["kind"] == "product"]
    assert {(row["case"], row.get("masks")) for row in products if row["rows"] == 1} == {
        ("dense", None), ("A50", "random"), ("W50", "random"), ("W50A50", "wanda"),
    }  # fmt: skip
    assert {row["shape"] for row in products} == {"qkv", "o", "gate+up", "down"}
    assert {row["case"] for row in products if row["rows"] == 5} == {"dense", "W50"}
    for row in products:
        assert row["us_p10"] <= row["us"] <= row["us_p90"] and row["bytes"] > 0
        assert row["case"] == "dense" or row["error"] <= 2.5
    assert found["rows"][0] == {"kind": "check", "checks": 16}
    assert "torch 2:4: not on this device, dtype or shape" in found["left_out"]
    assert page.count("\n| o |") == sum(row["shape"] == "o" for row in products)
    assert "Its times mean nothing" in page


def test_steps_are_held_against_both_dense_ones(dry: tuple[Any, str], bench: Any) -> None:
    rows = [row for row in dry[0]["rows"] if row["kind"] == "step"]
    times = {(row["case"], row["context"]): row["us"] for row in rows}
    assert {case for case, _ in times} == {"dense", "dense, compiled by torch", "A50", "W50A50"}
    sizes = bench.gpu_run.DRY.sizes
    weights = sum(O * I for O, I in sizes.shapes.values()) + sizes.vocabulary * sizes.hidden
    for row in rows:
        if row["case"].startswith("dense"):
            assert row["bytes"] == 2 * weights
            continue
        assert row["bytes"] < 2 * weights and row["context"] in (16, 40)
        assert row["cache_bytes"] == 2 * 2 * 4 * 64 * row["context"]
        plan, peer = (times[name, row["context"]] for name in ("dense", "dense, compiled by torch"))
        assert row["over_plan"] == pytest.approx(plan / row["us"], abs=1e-3)
        assert row["over_compiled"] == pytest.approx(peer / row["us"], abs=1e-3)
        assert row["speedup"] == min(row["over_plan"], row["over_compiled"])
        assert set(row["channels_read"]) == {"qkv", "o", "gate+up", "down"}


def test_no_time_is_said(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.bench_gpu.main(["--dry-run", "--seconds", "0", "--out", str(tmp_path / "gpu")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "step A50 random: no time left" in found["left_out"]
    assert "compiled dense step at context 16: no time left" in found["left_out"]
    assert {row["kind"] for row in found["rows"]} == {"check", "read"}
    assert all(row["block"] is None for row in found["targets"])
    assert "| weights 70 % |  | 1 | not measured |" in (tmp_path / "gpu.md").read_text()


def test_all_sections_end_in_ten_minutes(bench: SimpleNamespace) -> None:
    """Begun before 510 seconds and stopped a grace later, and half a minute to start up."""
    assert sum(bench.gpu_run.REAL.seconds.values()) <= 510
    assert 510 + bench.gpu_run.GRACE + 30 < 600


def test_a_section_that_hangs_is_stopped(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.gpu_run, "GRACE", 0.05)
    run = new_run(bench, seconds={"read": 0.05, "steps": 5.0})
    begun = time.monotonic()
    with run.section("read"):
        time.sleep(20)
    assert time.monotonic() - begun < 5
    assert run.left_out == ["the rest of read: stopped after 0 s"]
    with run.section("steps"):
        assert run.has_time("anything")
    time.sleep(0.1)  # the alarm is off


Change = Callable[[pytest.MonkeyPatch], None]


def scaled(module: ModuleType, name: str) -> Change:
    """A function of a module makes everything a tenth larger."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: right(*args) * 1.1)

    return change


def idle(module: ModuleType, name: str) -> Change:
    """A function of a module does nothing."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda *args: None)


def swiglu_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.finish_swiglu

    def wrong(partials: Tensor, biases: Any, out_BO: Tensor, gate: Any) -> Any:
        found = right(partials, biases, out_BO, gate)
        out_BO *= 1.1
        return found

    monkeypatch.setattr(gpu, "finish_swiglu", wrong)


def one_input_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.list_channels

    def wrong(*args: Any) -> gpu.ChannelList:
        found = right(*args)
        found.x_CBN[0, :, 0] = 0
        return found

    monkeypatch.setattr(gpu, "list_channels", wrong)


def list_of_swiglu_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.finish_swiglu

    def wrong(*args: Any) -> Any:
        found = right(*args)
        if found is not None:
            found.counts_C[0] -= 1
        return found

    monkeypatch.setattr(gpu, "finish_swiglu", wrong)


def never_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu._partials
    runs = iter(range(10**6))
    monkeypatch.setattr(gpu, "_partials", lambda *args: right(*args) * (1 + next(runs) % 2 * 2e-3))


PRODUCT, SWIGLU = ((33, 70), 2, 0.5, 0.5), ((33, 70), 5, 0.5, 0.5)
WRONG: dict[str, tuple[Change, str, tuple[Any, ...], str]] = {
    "product": (scaled(gpu, "_partials"), "check_product", PRODUCT, "33x70 rows 2.*wrong by"),
    "columns": (
        scaled(gpu, "_partials"), "check_product", ((33, 70), 1, 0.0, 0.5), "rows 1.*wrong by",
    ),
    "list": (one_input_lost, "check_product", PRODUCT, "33x70 rows 2.*wrong by"),
    "unpacking": (
        scaled(gpu, "dense_columns"), "check_product", PRODUCT, "unpacking is not exact",
    ),
    "order": (never_the_same, "check_product", PRODUCT, "two runs differ"),
    "SwiGLU": (swiglu_scaled, "check_swiglu", SWIGLU, "SwiGLU 33x70 rows 5.*wrong by"),
    "SwiGLU's list": (list_of_swiglu_lost, "check_swiglu", SWIGLU, "the list is not that of"),
    "attention": (idle(gpu_step, "attention"), "check_step", ("W0",), "step W0: wrong by"),
    "norm": (idle(gpu_step, "rms_norm"), "check_step", ("W50",), "step W50: wrong by"),
    "a step's SwiGLU": (idle(gpu_step, "silu_mul"), "check_step", ("W0",), "step W0: wrong by"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(
    bench: SimpleNamespace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, check, arguments, message = WRONG[name]
    checked = getattr(bench.gpu_checks, check)
    checked(*arguments, bench.gpu_run.DRY)  # right as it is
    change(monkeypatch)
    with pytest.raises(SystemExit, match=message):
        checked(*arguments, bench.gpu_run.DRY)


def test_a_wrong_threshold_is_found(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float64 step takes over what the plan counts, but not blindly."""
    right = gpu.list_channels
    monkeypatch.setattr(gpu, "list_channels", lambda x, t, *rest: right(x, t * 0.7, *rest))
    with pytest.raises(SystemExit, match=r"step A50: counts an input 0\.0[5-9]"):
        bench.gpu_checks.check_step("A50", bench.gpu_run.DRY)


def test_a_wrong_kernel_stops_the_run_before_anything_is_timed(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scaled(gpu, "_partials")(monkeypatch)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.bench_gpu.main(["--dry-run", "--out", str(tmp_path / "gpu")])
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == []


def linear(bench: SimpleNamespace, run: Any) -> Any:
    return bench.gpu_products.Linear(run, "o", (32, 64), 1, 1e9)


def test_2_of_4_is_checked_and_takes_its_copies_in_turn(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []

    def semi_structured(weight_OI: Tensor) -> Tensor:
        assert gpu_selection.is_2_of_4(weight_OI != 0)
        made.append(weight_OI.clone())
        return made[-1]

    monkeypatch.setattr(gpu_selection, "semi_structured", semi_structured)
    monkeypatch.setattr(bench.gpu_products, "ring", lambda *_: 4)
    run = new_run(bench)
    linear(bench, run).bench_2_of_4()
    assert len(made) == 4 and len({copy.data_ptr() for copy in made}) == 4
    row = run.rows[-1]
    assert row["case"] == "torch 2:4" and row["bytes"] == 32 * 64 * 9 // 8 and not run.left_out
    monkeypatch.setattr(gpu_selection, "semi_structured", lambda weight_OI: weight_OI * 1.1)
    linear(bench, run).bench_2_of_4()
    assert run.rows[-1]["case"] == "dense"
    assert "torch 2:4: SystemExit o rows 1 torch 2:4 random: wrong by" in run.left_out[0]


def small_decoder(bench: SimpleNamespace, case: str, gated: bool = False) -> Any:
    setting = bench.gpu_run.DRY
    layers = bench.gpu_steps.some_layers(case, "random", setting)
    head_VI = bench.gpu_checks.random_head(setting.sizes, setting)
    thresholds = torch.full((4 * setting.sizes.layers, 1), 0.5) if gated else None
    return bench.gpu_decoder.Decoder(setting.sizes, layers, head_VI, 20, 1, thresholds)


def test_the_peer_compiles_as_one_graph(bench: SimpleNamespace) -> None:
    """Without Inductor, which the CPU here need not have a compiler for."""
    decoder = small_decoder(bench, "W0")
    peer, again = bench.gpu_peer.Peer(decoder), bench.gpu_peer.Peer(decoder)
    x_BI = torch.randn_like(decoder.x_BI)
    step = torch.compile(peer, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        assert torch.equal(step(x_BI), again(x_BI))
        assert torch.equal(peer.keys0, again.keys0)  # the new token is stored


def test_a_peer_that_fails_is_left_out(bench: SimpleNamespace) -> None:
    def refusing(peer: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    run, baselines = new_run(bench), bench.gpu_steps.Baselines()
    with run.section("peer"):
        bench.gpu_steps.bench_peer(run, 1e9, baselines, refusing)
    assert run.left_out == ["compiled dense step: RuntimeError no compiler"]
    assert not run.rows and baselines.gains(16, 1.0) == {}


def test_bytes_of_a_step_are_those_of_its_lists(bench: SimpleNamespace) -> None:
    decoder = small_decoder(bench, "W50A50", gated=True)
    decoder.x_BI.normal_()
    with bench.gpu_records.recorded_lists() as lists, bench.gpu_records.recorded_bytes() as loaded:
        decoder.plan.run()
    expected = []
    for site, channels in zip(bench.gpu_decoder.SITES, lists, strict=True):
        active_I = bench.gpu_records.kept_inputs(channels)[1]
        assert 0 < active_I.sum() < len(active_I)
        parts = decoder.layers[0].weights[site]
        assert gpu_layout.joined(parts) is not None  # one launch
        expected.append(sum(bench.gpu_cases.read_bytes(part, active_I) for part in parts))
    assert loaded == [*expected, decoder.head_VI.nbytes]


def test_thresholds_are_found(bench: SimpleNamespace) -> None:
    decoder = small_decoder(bench, "A50")
    setting = replace(bench.gpu_run.DRY, searched=9)
    found = bench.gpu_steps.skipping(decoder, 0.5, setting)
    assert found.thresholds_SB.min() > 0 and not found.counts_S3.any()
    for _ in range(2):
        found.x_BI.normal_()
        found.plan.run()
    shares = bench.gpu_steps.mean_shares(found)
    assert all(abs(share - 0.5) < 0.2 for share in shares.values()), shares


class Event:
    """In place of a CUDA event: says when it was recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    """In place of a CUDA graph: its replays take a tenth of a second."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1
        time.sleep(0.1)


def test_what_only_a_gpu_runs(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, streams and events, with stand-ins: every line of the timers is run."""
    monkeypatch.setattr(bench.gpu_run.Setting, "on_gpu", True)
    monkeypatch.setattr(bench.gpu_run, "RING_BYTES", 2**14)
    monkeypatch.setattr(bench.gpu_run, "CALLS", 7)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Event)
    for name in ("graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    run = new_run(bench, contexts=(16,), steps=(("A50", "wanda"),))
    with run.section("products"):
        linear(bench, run).bench(("W50", "random"))
    # four copies exceed 16 KiB, twice makes at least 7 calls; 2 replays, and 3 before
    assert Graph.replays == 2 * 5
    assert all(1e5 / 8 <= row["us"] < 1.5e5 / 8 for row in run.rows)
    baselines = bench.gpu_steps.Baselines()
    with run.section("peer"):
        bench.gpu_steps.bench_dense(run, 1e9, baselines)
        bench.gpu_steps.bench_peer(run, 1e9, baselines, lambda peer: peer)
    with run.section("steps"):
        bench.gpu_steps.bench_steps(run, 1e9, baselines)
    assert not run.left_out
    names = [row["case"] for row in run.rows if row["kind"] == "step"]
    assert names == ["dense", "dense, compiled by torch", "A50"]
    assert run.rows[-1]["us_p10"] < run.rows[-1]["us_p90"]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_everything_of_a_step_is_made_on_the_gpu(
    bench: SimpleNamespace, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's device without contents stands for one: its tensors refuse to meet the CPU's."""
    launches = importlib.import_module("gpu_launches")
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(gpu, "implementation", lambda device: "triton")
    monkeypatch.setattr(GpuPlan, "run", lambda plan: plan.replay(1))  # positions are not read
    monkeypatch.setattr(gpu_layout, "joined", lambda weights: None)  # asks for addresses
    sizes, setting = bench.gpu_run.DRY.sizes, replace(bench.gpu_run.DRY, device="meta", searched=1)
    with torch.no_grad():
        norms = bench.gpu_decoder._site_norms(sizes, "wanda", "meta")
        dense = {name: torch.randn(shape, device="meta") for name, shape in sizes.shapes.items()}
        weights = {}
        for name, (O, I) in sizes.shapes.items():
            parts = dense[name].split(bench.gpu_decoder.widths(sizes, name))
            weights[name] = tuple(
                ChannelWeight(torch.randn(I, len(part), device="meta"), None, len(part), I, 512)
                for part in parts
            )
            if packed:
                starts = torch.zeros(2 * I + 1, dtype=torch.int32, device="meta")
                weights[name] = tuple(
                    ChannelWeight(torch.zeros(O * I, device="meta"), starts, len(part), I, 256)
                    for part in parts
                )
        layer = bench.gpu_decoder.Layer(dense, weights, norms)
        head_VI = torch.randn(sizes.vocabulary, sizes.hidden, device="meta")
        decoder = bench.gpu_decoder.Decoder(sizes, [layer], head_VI, 20)
        with launches.recorded_launches() as names:
            decoder.plan.run()
            gated = bench.gpu_steps.skipping(decoder, 0.5, setting)
            gated.plan.run()
        assert names.count("list_channels") == 4 * 2
        assert bench.gpu_steps.read_shares(gated).device.type == "meta"
        logits_BV = bench.gpu_peer.Peer(decoder)(decoder.x_BI)
        assert logits_BV.shape == (1, sizes.vocabulary) and logits_BV.device.type == "meta"


def test_targets_pass_and_fail(bench: SimpleNamespace) -> None:
    run = new_run(bench)
    for name in ("qkv", "o", "gate+up", "down"):
        about = {"kind": "product", "shape": name, "rows": 1}
        run.rows.append({**about, "case": "dense", "us": 15.0})
        run.rows.append({**about, "case": "W50", "masks": "random", "us": 10.4})
    step = {"kind": "step", "case": "W50", "masks": "random"}
    run.rows += [
        {**step, "context": 256, "speedup": 1.41},
        {**step, "context": 4096, "speedup": 1.3},
    ]
    found = {(row["target"], row["rows"]): row for row in bench.gpu_report.targets(run)}
    half = found["weights 50 %", 1]
    assert half["kernels"]["gate+up"] == half["block"] == pytest.approx(1.442, abs=1e-3)
    assert half["met"] == {"qkv": True, "o": True, "gate+up": False, "down": True}
    assert half["block_met"] and half["steps_met"] == {"256": True, "4096": False}
    assert found["weights 50 %, batch 2 to 8", 4]["block"] is None
    table = "\n".join(bench.gpu_report._target_table(list(found.values())))
    page = json.loads(bench.gpu_cases.PREDICTED.with_suffix(".json").read_text())
    kernels, step = (
        next(r["speedup"] for r in page[kind] if r["case"] == "W50") for kind in ("blocks", "steps")
    )
    assert half["predicted"] == kernels and half["predicted_step"] == step
    assert (
        f"| 1.44x **fail** | 1.44x pass | 1.44x pass (1.4 / 1.5; {kernels:.2f}x) "
        f"| 256: 1.41x pass, 4096: 1.30x **fail** (1.4; {step:.2f}x) |" in table
    )


def test_without_a_gpu_it_says_what_to_do(bench: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="no CUDA device; --dry-run"):
        bench.bench_gpu.main([])
