"""Selection by measurement, with a timer that says what the test wants."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from prune_llm_kernels import gpu_layout, reference
from prune_llm_kernels.gpu_selection import calibrate, choose, measure, ways

MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]


def test_the_fastest_unless_dense_is_as_fast() -> None:
    assert choose({"dense": 1.0, "packed": 0.7, "joint": 0.5}) == "joint"
    assert choose({"dense": 1.0, "packed": 1.2, "joint": 1.1}) == "dense"
    assert choose({"dense": 1.0, "packed": 0.99}) == "dense"


def test_every_way_is_the_same_product(make_weight: MakeWeight) -> None:
    weight, x = make_weight(40, 60, 0.5, torch.float32), torch.randn(2, 60)
    packed, thresholds = gpu_layout.pack_channels(reference.pack(weight), 256), torch.rand(2)
    kept = torch.where(reference.counting(x, thresholds, None), x, 0)
    calls = ways(x, weight, packed, thresholds)
    for way, expected in {"dense": x, "packed": x, "listed": kept, "joint": kept}.items():
        found = calls[way]()
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found, F.linear(expected, weight), atol=1e-5, rtol=1e-5)
    assert set(ways(x, weight, packed)) == {"dense", "packed"}


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


def test_calibration_keeps_to_its_time_and_leaves_the_rest_dense() -> None:
    clock = Clock({"dense": 0.3, "packed": 0.1})
    cases = {(8, 8, rows): clock.calls for rows in (1, 2, 4)}
    # 0.4 s for a round of both ways: two cases fit into 0.7 s, the third does not
    found = calibrate(cases, clock.timer, limit=0.7, clock=clock)
    assert [choice.way for choice in found.values()] == ["packed", "packed", "dense"]
    assert found[8, 8, 4].seconds == {}
    assert found[8, 8, 1].report() == {
        "out_features": 8, "in_features": 8, "rows": 1, "way": "packed",
        "seconds": {"dense": 0.3, "packed": 0.1}, "speedup": 3.0,
    }  # fmt: skip
    assert found[8, 8, 4].report()["speedup"] == 1.0


def test_ways_are_timed_in_turn_and_medians_kept() -> None:
    order, times = [], iter([5.0, 1.0, 1.0, 1.0, 1.0, 9.0])

    def timer(call: Callable[[], object]) -> float:
        order.append(call())
        return next(times)

    calls: dict[str, Callable[[], object]] = {"dense": lambda: "dense", "packed": lambda: "packed"}
    ticks = iter([0.0, 1.0, 2.0, 3.0])
    assert measure(calls, timer, 2.5, lambda: next(ticks)) == {"dense": 1.0, "packed": 1.0}
    assert order == ["dense", "packed"] * 3
