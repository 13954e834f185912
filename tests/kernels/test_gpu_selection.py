"""Selection by measurement, with a timer that says what the test wants."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu_layout, reference
from prune_llm_kernels.channel_weight import _dense_channels
from prune_llm_kernels.gpu_selection import Key, calibrate, choose, copies_of, measure, ways
from prune_llm_kernels.gpu_ways import Ways

MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]


def test_the_fastest_unless_dense_is_as_fast() -> None:
    assert choose({"dense": 1.0, "packed": 0.7, "joint": 0.5}) == "joint"
    assert choose({"dense": 1.0, "packed": 1.2, "joint": 1.1}) == "dense"
    assert choose({"dense": 1.0, "packed": 0.99}) == "dense"


def test_every_way_is_the_same_product(make_weight: MakeWeight) -> None:
    weight, x = make_weight(40, 60, 0.5, torch.float32), torch.randn(2, 60)
    packed, thresholds = gpu_layout.pack_channels(reference.pack(weight), 256), torch.rand(2)
    kept = torch.where(reference.counting(x, thresholds, None), x, 0)
    columns = _dense_channels(weight, 256)
    for form, names in ((packed, {"dense", "packed", "joint"}), (columns, {"dense", "listed"})):
        copies = copies_of(form)
        calls, all_of_them = ways(x, form, copies, thresholds), ways(x, form, copies)
        assert set(calls) == names and set(all_of_them) == names - {"joint", "listed"}
        for found, expected in ((calls, kept), (all_of_them, x)):
            for call in found.values():
                y = call()
                assert isinstance(y, Tensor)
                torch.testing.assert_close(y, F.linear(expected, weight), atol=1e-5, rtol=1e-5)
    assert copies_of(columns).dense_IO is not None  # the weight itself, not another copy
    assert copies_of(columns).dense_IO.data_ptr() == columns.data.data_ptr()  # type: ignore[union-attr]


class Clock:
    """Time passes only when something is timed."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now, self.seconds = 0.0, seconds

    def calls(self) -> dict[str, Callable[[], object]]:
        return {way: lambda way=way: way for way in self.seconds}  # type: ignore[misc]

    def timer(self, call: Callable[[], object]) -> float:
        self.now += self.seconds[str(call())]
        return self.seconds[str(call())]

    def __call__(self) -> float:
        return self.now


def test_calibration_keeps_to_its_time_and_says_what_it_did_not_measure() -> None:
    clock = Clock({"dense": 0.3, "packed": 0.1})
    compiled: list[Key] = []

    def case(key: Key) -> Callable[[], dict[str, Callable[[], object]]]:
        def make() -> dict[str, Callable[[], object]]:
            clock.now += 60  # what kernels take to compile is not timed
            compiled.append(key)
            return clock.calls()

        return make

    keys = [(8, 8, rows) for rows in (1, 2, 4)]
    # 0.4 s for a round of both ways: two cases fit into 0.7 s, the third does not
    found = calibrate(
        {key: case(key) for key in keys}, lambda key: "packed", clock.timer, 0.7, clock
    )
    assert compiled == keys[:2]
    assert [choice.way for choice in found.values()] == ["packed"] * 3
    assert found[8, 8, 1].report() == {
        "out_features": 8, "in_features": 8, "rows": 1, "way": "packed",
        "seconds": {"dense": 0.3, "packed": 0.1}, "speedup": 3.0,
    }  # fmt: skip
    report = found[8, 8, 4].report()
    assert report["speedup"] is None and report["seconds"] == {}
    assert report["note"] == "no time was left to measure it"


def test_ways_are_timed_in_turn_and_medians_kept() -> None:
    order, times = [], iter([5.0, 1.0, 1.0, 1.0, 1.0, 9.0])

    def timer(call: Callable[[], object]) -> float:
        order.append(call())
        return next(times)

    calls: dict[str, Callable[[], object]] = {"dense": lambda: "dense", "packed": lambda: "packed"}
    ticks = iter([0.0, 1.0, 2.0, 3.0, 3.0])
    medians = {"dense": 1.0, "packed": 1.0}
    assert measure(calls, timer, 2.5, lambda: next(ticks)) == (medians, 3.0)
    assert order == ["dense", "packed"] * 3


def test_rows_between_those_measured_go_the_way_of_the_next() -> None:
    found = Ways(8, None, None, {1: "joint", 4: "packed", 16: "dense"})
    assert [found.way(n) for n in (1, 2, 4, 5, 16, 64)] == [
        "joint", "packed", "packed", "dense", "dense", "dense",
    ]  # fmt: skip
    assert Ways(8, None, None, {}).way(1) is None
