"""A decode step of Llama's shape over the GPU's plan, as prune_llm records one for a loaded model.

Weights that share an input lie together; norms, attention over a paged cache and the head are the
plan's own. Weights are random; the layers take a few distinct ones in turn, which together exceed
the second cache.

Shape letters: B = rows, O = output features, I = input features, V = vocabulary, S = sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from gpu_cases import Sizes, channel_norms, form, random_weight
from torch import Tensor

from prune_llm_kernels import ChannelWeight, gpu, gpu_layout
from prune_llm_kernels.kv_cache import LANES, KeyValueCache
from prune_llm_kernels.plan import AttentionStep, Gate

EPSILON = 1e-5
SITES = ("qkv", "o", "gate+up", "down")  # what a list of channels is made for


@dataclass(frozen=True)
class Layer:
    """The weights of a block, as a plan has them and dense.

    Attributes:
        dense: [O, I] by name, those that share an input above each other: for peers and float64.
        weights: of each name the parts.
        norms: float32 [I] by name: of the inputs, and the weights of the RMS norms.
    """

    dense: dict[str, Tensor]
    weights: dict[str, tuple[ChannelWeight, ...]]
    norms: dict[str, Tensor]


def random_layer(
    sizes: Sizes, pruned: float, masks: str, dtype: torch.dtype, device: str = "cpu"
) -> Layer:
    norms = _site_norms(sizes, masks, device)
    dense: dict[str, Tensor] = {}
    for name, (O, _) in sizes.shapes.items():
        # inputs of other norms than one would make larger outputs
        size = float(norms[name].square().mean().sqrt())
        dense[name] = random_weight(O, pruned, norms[name], dtype) / size
    # what makes the inputs of o and down is given their norms
    kv = sizes.kv_heads * sizes.head_size
    of_values = norms["o"].view(sizes.kv_heads, -1, sizes.head_size)[:, 0].flatten()
    dense["qkv"][-kv:] *= of_values[:, None].to(dtype)
    dense["gate+up"][sizes.intermediate :] *= norms["down"][:, None].to(dtype)
    weights = {
        name: gpu_layout.lay_together(
            [form(part, pruned) for part in weight.split(widths(sizes, name))]
        )
        for name, weight in dense.items()
    }
    return Layer(dense, weights, norms)


def _site_norms(sizes: Sizes, masks: str, device: str) -> dict[str, Tensor]:
    """Of the inputs of each site; heads that share values have theirs."""
    found = {name: channel_norms(I, masks, device) for name, (_, I) in sizes.shapes.items()}
    of_values = channel_norms(sizes.kv_heads * sizes.head_size, masks, device)
    group = sizes.heads // sizes.kv_heads
    by_head = of_values.view(sizes.kv_heads, sizes.head_size)
    found["o"] = by_head.repeat_interleave(group, 0).flatten()
    return found


def widths(sizes: Sizes, name: str) -> list[int]:
    """Outputs of the linears that are one in `Sizes.shapes`."""
    kv = sizes.kv_heads * sizes.head_size
    parts = {
        "qkv": [sizes.heads * sizes.head_size, kv, kv],
        "gate+up": [sizes.intermediate] * 2,
    }
    return parts.get(name, [sizes.hidden])


@dataclass
class Decoder:
    """One plan over buffers of its own. Fill x with embeddings before each run.

    Args:
        layers: taken in turn for the blocks of ``sizes``.
        head_VI: of the model, dense.
        context: tokens that a row attends to, its own the last of them.
        thresholds_SB: float32, of every block's sites; None: nothing is skipped, without lists.
    """

    sizes: Sizes
    layers: Sequence[Layer]
    head_VI: Tensor
    context: int
    rows: int = 1
    thresholds_SB: Tensor | None = None
    x_BI: Tensor = field(init=False)
    logits_BV: Tensor = field(init=False)
    counts_S3: Tensor = field(init=False)
    caches: list[KeyValueCache] = field(init=False)

    def __post_init__(self) -> None:
        sizes, device = self.sizes, self.head_VI.device
        self.plan = gpu.new_plan(self.head_VI.dtype)
        self.x_BI, self._normed_BI = self._buffer(sizes.hidden), self._buffer(sizes.hidden)
        self.logits_BV = self._buffer(sizes.vocabulary)
        self.counts_S3 = torch.zeros(len(SITES) * sizes.layers, 3, dtype=torch.int64, device=device)
        self.positions_B = torch.full((self.rows,), self.context - 1, device=device)
        self.pages_BN = torch.arange(self.rows, device=device)[:, None]
        whole = -(-self.context // LANES) * LANES  # of the page
        self.angles = rotary_angles(whole, sizes.head_size, device)
        self.caches = [self._cache() for _ in range(sizes.layers)]
        heads = [self._buffer(width) for width in widths(sizes, "qkv")]
        outs = [*heads, self._buffer(sizes.heads * sizes.head_size)]
        hidden = [self._buffer(sizes.intermediate) for _ in range(2)]
        for block in range(sizes.layers):
            self._block(block, outs, hidden)
        ones = torch.ones(sizes.hidden, dtype=self.head_VI.dtype, device=device)
        self.plan.rms_norm(self.x_BI, ones, EPSILON, self._normed_BI)
        self.plan.linears(self._normed_BI, [self.head_VI], [None], [self.logits_BV])

    def layer(self, block: int) -> Layer:
        return self.layers[block % len(self.layers)]

    def _buffer(self, width: int) -> Tensor:
        return self.head_VI.new_zeros(self.rows, width)

    def _cache(self) -> KeyValueCache:
        """A page for each row, its past tokens random."""
        sizes, dtype = self.sizes, self.head_VI.dtype
        cache = KeyValueCache.allocate(
            self.rows, sizes.kv_heads, self.context, sizes.head_size, dtype, self.head_VI.device
        )
        cache.keys.normal_()
        cache.values.normal_()
        return cache

    def _gate(self, block: int, site: str) -> Gate | None:
        if self.thresholds_SB is None:
            return None
        at = block * len(SITES) + SITES.index(site)
        return Gate(self.thresholds_SB[at], None, self.counts_S3[at])

    def _block(self, block: int, outs: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
        layer, plan, (q, k, v, out) = self.layer(block), self.plan, outs
        self._norm(layer.norms["qkv"])
        gate = self._gate(block, "qkv")
        plan.linears(self._normed_BI, layer.weights["qkv"], [None] * 3, [q, k, v], gate=gate)
        size = self.sizes.head_size
        heads = (part.view(self.rows, -1, size) for part in (q, k, v, out))
        places = self.caches[block], self.pages_BN, self.positions_B
        plan.attention(AttentionStep(*heads, *self.angles, *places, size**-0.5))
        gate = self._gate(block, "o")
        plan.linears(out, layer.weights["o"], [None], [self.x_BI], accumulate=True, gate=gate)
        self._norm(layer.norms["gate+up"])
        one, other = layer.weights["gate+up"]
        gate = self._gate(block, "gate+up")
        if gate is None:
            plan.linears(self._normed_BI, [one, other], [None] * 2, hidden)
            plan.silu_mul(*hidden, hidden[0])
        else:
            plan.swiglu(self._normed_BI, (one, other), (None, None), hidden[0], gate)
        gate = self._gate(block, "down")
        plan.linears(
            hidden[0], layer.weights["down"], [None], [self.x_BI], accumulate=True, gate=gate
        )

    def _norm(self, norms_I: Tensor) -> None:
        weight_I = norms_I.to(self.x_BI.dtype)
        self.plan.rms_norm(self.x_BI, weight_I, EPSILON, self._normed_BI)


def rotary_angles(positions: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, R], float32."""
    frequencies = 500000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    angles = torch.arange(positions, device=device)[:, None] * frequencies
    turned = torch.cat([angles, angles], 1)
    return turned.cos(), turned.sin()
