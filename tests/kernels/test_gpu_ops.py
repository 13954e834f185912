"""The GPU's ops as torch sees them: schemas, fake results, whole graphs, errors.

They run in Triton's interpreter, here on CPU tensors.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout, gpu_ops, reference

MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]
O, I = 20, 30


@pytest.fixture
def weight(make_weight: MakeWeight) -> Tensor:
    return make_weight(2 * O, I, 0.5, torch.float32)


@pytest.fixture
def channels(weight: Tensor) -> ChannelWeight:
    return gpu_layout.pack_channels(reference.pack(weight), 256)


def test_opcheck(channels: ChannelWeight) -> None:
    x, thresholds = torch.randn(2, I), torch.full((2,), 0.5)
    ops = torch.ops.prune_llm
    torch.library.opcheck(ops.list_channels, (x, thresholds, None))
    torch.library.opcheck(ops.list_channels, (x, thresholds, torch.ones(I)))
    listed = gpu_ops.list_channels(x, thresholds)
    parts = channels.data, channels.starts, channels.out_features, channels.tile
    torch.library.opcheck(ops.listed_linear, (*listed, I, *parts, torch.randn(2 * O)))
    torch.library.opcheck(ops.listed_swiglu, (*listed, I, *parts, None, thresholds, None))


class Mlp(nn.Module):
    """Gate, up and down of a block whose inputs and hidden values are skipped."""

    def __init__(self, gate_up: Tensor, down: Tensor, thresholds_B: Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = (
            gpu_layout.pack_channels(reference.pack(w), 256) for w in (gate_up, down)
        )
        self.thresholds_B = thresholds_B

    def forward(self, x: Tensor) -> Tensor:
        listed = gpu_ops.list_channels(x, self.thresholds_B)
        _, *following = gpu_ops.listed_swiglu(listed, self.gate_up, self.thresholds_B)
        first, second, third = following
        return gpu_ops.listed_linear((first, second, third), self.down) + x


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_graph_break(make_weight: MakeWeight, weight: Tensor) -> None:
    down, x, thresholds = make_weight(I, O, 0.5, torch.float32), torch.randn(3, I), torch.rand(3)
    mlp = Mlp(weight, down, thresholds)
    kept = torch.where(reference.counting(x, thresholds, None), x, 0)
    gate, up = F.linear(kept, weight).chunk(2, -1)
    hidden = F.silu(gate) * up
    hidden = torch.where(reference.counting(hidden, thresholds, None), hidden, 0)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(hidden, down) + x, atol=1e-4, rtol=1e-4)


def test_fake_tensors_need_no_kernel(channels: ChannelWeight) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, thresholds = torch.empty(4, I), torch.empty(4)
        listed = gpu_ops.list_channels(x, thresholds)
        assert [tuple(t.shape) for t in listed] == [(1, 128), (1, 4, 128), (1,)]
        y, *following = gpu_ops.listed_swiglu(listed, channels, thresholds)
        assert y.shape == (4, O) and following[1].shape == (1, 4, 128)


def test_the_gpu_backend_runs_the_public_op(
    channels: ChannelWeight, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """channel_linear of a CUDA tensor goes to gpu.py; here its way is followed on the CPU."""
    monkeypatch.setattr("prune_llm_kernels.ops.backend_for", lambda device: gpu)
    x = torch.randn(2, I)
    arguments = channels.data, channels.starts, 2 * O, I, channels.tile, None
    y = torch.ops.prune_llm.channel_linear(x, *arguments)
    torch.testing.assert_close(y, F.linear(x, weight))


def test_wrong_arguments(channels: ChannelWeight) -> None:
    x, thresholds = torch.randn(2, I), torch.zeros(2)
    with pytest.raises(ValueError, match=r"thresholds is torch.float32 of shape \[3\]; it must be"):
        gpu_ops.list_channels(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"scales is torch.float16 of shape \[30\]"):
        gpu_ops.list_channels(x, thresholds, torch.ones(I).half())
    listed = gpu_ops.list_channels(x, thresholds)
    with pytest.raises(ValueError, match=r"bias is .*\[3\]; it must be torch.float32 \[40\]"):
        gpu_ops.listed_linear(listed, channels, torch.zeros(3))
    wide = gpu_ops.list_channels(torch.randn(2, 200), thresholds)
    with pytest.raises(ValueError, match=r"the list is torch.float32 of 2 chunks; the weight is"):
        gpu_ops.listed_linear(wide, channels)
