"""Plans of the GPU, on CPU tensors: against the reference plan, step by step over a cache."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, reference
from prune_llm_kernels.gpu_plan import GpuPlan
from prune_llm_kernels.kv_cache import KeyValueCache
from prune_llm_kernels.plan import AttentionStep, Gate, Plan
from prune_llm_kernels.reference_plan import ReferencePlan

B, H, K, D, I = 5, 4, 2, 8, 40  # rows, query heads, key heads, head size, width
PAGES, PAGE = 9, 16


def make_weight(O: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.where(torch.rand(O, columns) < 0.5, torch.randn(O, columns), 0).to(dtype) / 3


def weight_for(plan: Plan, weight: Tensor) -> ChannelWeight | Tensor:
    """The reference plan takes the dense weight; a gated one as channels of the CPU's order."""
    if isinstance(plan, GpuPlan):
        return gpu_layout.pack_channels(reference.pack(weight), 256)
    return reference.pack_channels(reference.pack(weight), 64)


class Block:
    """One attention and one MLP over buffers of its own; the same seed makes the same block."""

    def __init__(self, plan: Plan, dtype: torch.dtype, window: int = 0) -> None:
        torch.manual_seed(5)
        self.plan, self.dtype = plan, dtype
        self.x = torch.randn(B, I).to(dtype)
        self.positions, self.counts = torch.zeros(B, dtype=torch.int64), torch.zeros(3).long()
        self.thresholds = torch.full((B,), 0.3)
        normed, norm = self.buffer(I), torch.rand(I).to(dtype) / 2
        q, k, v, out = (self.buffer(heads * D) for heads in (H, K, K, H))
        gate = Gate(self.thresholds, torch.rand(I) + 0.5, self.counts)
        weights = [self.weight(O, I) for O in (H * D, K * D, K * D)]
        bias = torch.randn(H * D).to(dtype)
        plan.rms_norm(self.x, norm, 1e-5, normed)
        plan.linears(normed, weights, [bias, None, None], [q, k, v], gate=gate)
        angles = torch.rand(2 * PAGE, D) * 6
        self.cache = KeyValueCache.allocate(PAGES, K, PAGE, D, dtype)
        pages = torch.tensor([[3, 0], [5, 1], [2, 8], [4, 6], [7, -1]])
        heads = (t.view(B, -1, D) for t in (q, k, v, out))
        parts = angles.cos(), angles.sin(), self.cache, pages, self.positions, D**-0.5, window
        plan.attention(AttentionStep(*heads, *parts))
        plan.linears(out, [self.weight(I, H * D)], [None], [self.x], accumulate=True)
        hidden = self.buffer(24)
        pair = self.weight(24, I), self.weight(24, I)
        plan.swiglu(self.x, pair, (None, torch.randn(24).to(dtype)), hidden, gate)
        plan.linears(hidden, [make_weight(I, 24, dtype)], [None], [self.x], accumulate=True)

    def buffer(self, width: int) -> Tensor:
        return torch.full((B, width), float("nan")).to(self.dtype)

    def weight(self, O: int, columns: int) -> ChannelWeight:
        found = weight_for(self.plan, make_weight(O, columns, self.dtype))
        assert isinstance(found, ChannelWeight)
        return found


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.float16, 2e-2)])
def test_steps_are_those_of_the_reference(dtype: torch.dtype, most: float, window: int) -> None:
    ours, plain = Block(GpuPlan(dtype), dtype, window), Block(ReferencePlan(dtype), dtype, window)
    runs = [
        (None, [0, 0, -1, 0, 0]),
        (3, [1, 1, 14, 9, 9]),
        (None, [15, -1, 15, -1, 1]),
        (None, [16, 17, 31, 2, -1]),
        (2, [-1, -1, 0, 0, 0]),
    ]
    for rows, positions in runs:
        inputs = torch.randn(B, I).to(dtype)
        for block in (ours, plain):
            block.x.copy_(inputs)
            block.positions.copy_(torch.tensor(positions))
            block.plan.run(rows)
        assert ours.x.isfinite().all()
        assert (ours.x - plain.x).abs().max() <= most * plain.x.abs().max()
        for name in ("keys", "values"):
            found, expected = (getattr(block.cache, name) for block in (ours, plain))
            assert (found - expected).abs().max() <= most * (1 + expected.abs().max())
    if dtype is torch.float32:
        assert torch.equal(ours.counts, plain.counts)


def test_thresholds_are_read_at_every_run() -> None:
    block = Block(GpuPlan(torch.float32), torch.float32)
    block.thresholds.fill_(-1)
    block.plan.run(1)
    assert block.counts.tolist() == [2 * I, 2 * I, 2]
    block.thresholds.fill_(1e9)
    block.plan.run(1)
    assert block.counts.tolist() == [2 * I, 2 * I, 4]


class Graph:
    """In place of a CUDA graph: replays what was called while it was recorded."""

    recording: "Graph | None" = None

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@contextlib.contextmanager
def recorded(graph: Graph) -> Iterator[None]:
    Graph.recording = graph
    yield
    Graph.recording = None


def test_the_second_run_of_as_many_rows_records_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    plan, calls = GpuPlan(torch.float32), []
    plan._add(torch.zeros(4, 1), lambda rows: calls.append((rows, Graph.recording is not None)))
    plan._device = torch.device("cuda")
    for rows in (2, 2, 2, None, 2, 4):
        plan.run(rows)
    # compiled by a run, recorded by the next, then only replayed
    assert calls == [(2, False), (2, True), (4, False), (4, True)]
    graphs = [plan._recorded[rows]._graph for rows in (2, 4)]
    assert [graph.replays for graph in graphs if isinstance(graph, Graph)] == [3, 1]


def test_what_a_plan_refuses() -> None:
    plan, x, out = GpuPlan(torch.float32), torch.randn(1, 8), torch.zeros(1, 4)
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="a packed weight is in rows"):
        plan.linears(x, [reference.pack(weight)], [None], [out])
    with pytest.raises(ValueError, match="skipping inputs needs channel-major weights"):
        plan.linears(x, [weight], [None], [out], gate=Gate(torch.zeros(1)))
    plan.linears(x, [weight], [None], [out])
    with pytest.raises(ValueError, match="rows 2: must be between 1 and the 1"):
        plan.run(2)
    block = Block(GpuPlan(torch.float32), torch.float32)
    block.positions.fill_(99)
    with pytest.raises(ValueError, match="position 99: the row's pages hold 32 tokens"):
        block.plan.run()


def test_a_step_left_out_everywhere_changes_nothing() -> None:
    block = Block(GpuPlan(torch.float32), torch.float32)
    block.cache.keys.fill_(3)
    block.positions.fill_(-1)
    block.plan.run()
    assert (block.cache.keys == 3).all() and (block.cache.values == 0).all()


def test_the_gpu_backend_makes_it() -> None:
    assert isinstance(gpu.new_plan(torch.float16), GpuPlan)
