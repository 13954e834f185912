"""The registered ops: schema, fake results, torch.compile, and errors that name the argument."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_llm_kernels import PackedWeight, dense_linear, reference, sparse_linear, unpack

MakeWeight = Callable[[int, int, float, torch.dtype], Tensor]


@pytest.fixture
def weight(make_weight: MakeWeight) -> Tensor:
    return make_weight(24, 40, 0.5, torch.float32)


def arguments(packed: PackedWeight) -> tuple[object, ...]:
    return packed.bitmask, packed.packed, packed.offsets, packed.in_features


@pytest.mark.parametrize("rows", [1, 40])
def test_opcheck(weight: Tensor, rows: int) -> None:
    packed, x, bias = reference.pack(weight), torch.randn(rows, 40), torch.randn(24)
    torch.library.opcheck(torch.ops.prune_llm.sparse_linear, (x, *arguments(packed), bias))
    torch.library.opcheck(torch.ops.prune_llm.sparse_linear, (x, *arguments(packed), None))
    torch.library.opcheck(torch.ops.prune_llm.dense_linear, (x, weight, bias))
    torch.library.opcheck(torch.ops.prune_llm.unpack, arguments(packed))


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_graph_break(weight: Tensor) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = reference.pack(weight)

        def forward(self, x: Tensor) -> Tensor:
            return sparse_linear(x * 2, self.packed) + dense_linear(x, weight)

    layer, x = Layer(), torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(3 * x, weight))


def test_public_functions(weight: Tensor) -> None:
    packed = reference.pack(weight)
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(sparse_linear(x, packed), F.linear(x, weight))
    torch.testing.assert_close(dense_linear(x, weight), F.linear(x, weight))
    assert torch.equal(unpack(packed), weight)
    assert sparse_linear(torch.empty(0, 40), packed).shape == (0, 24)


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 39), None, r"x has shape \[2, 39\]; its last dimension must be 40"),
        (torch.zeros(40).half(), None, "x is torch.float16 on cpu; the weight is torch.float32"),
        (torch.zeros(40), torch.zeros(23), r"bias is .*\[23\]; it must be torch.float32 \[24\]"),
        (torch.zeros(40), torch.zeros(24).half(), "bias is torch.float16"),
        (torch.zeros(40), torch.zeros(48)[::2], "contiguous"),
    ],
    ids=["features", "dtype", "bias shape", "bias dtype", "bias stride"],
)
def test_wrong_argument(x: Tensor, bias: Tensor | None, message: str, weight: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_linear(x, reference.pack(weight), bias)
    with pytest.raises(ValueError, match=message):
        dense_linear(x, weight, bias)
