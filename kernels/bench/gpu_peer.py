"""The dense decode step that a speed-up has to beat, as gpt-fast writes one, and in float64 the
reference of ours: plain torch over fused weights and a static key-value cache.

Shape letters: B = rows, O = output features, I = input features, K = key-value heads, G = query
heads of one, T = tokens, D = head size, R = rotated elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu_cases import Sizes
from gpu_decoder import EPSILON, SITES, Decoder
from torch import Tensor, nn
from torch.nn import functional as F


class PeerLayer(nn.Module):
    """The weights of a block."""

    def __init__(self, dense: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        super().__init__()
        self.qkv, self.o, self.gate_up, self.down = (
            nn.Parameter(dense[name], requires_grad=False) for name in SITES
        )
        self.norm, self.mlp_norm = (
            nn.Parameter(norms[name].to(dense[name].dtype), requires_grad=False)
            for name in ("qkv", "gate+up")
        )


class Peer(nn.Module):
    """One token of every row at the last position of its cache.

    Parameters and buffers, so that a compiled step reads them where they are.

    Args:
        decoder: whose weights and cache it has; the cache is copied, the weights are not.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.sizes: Sizes = decoder.sizes
        distinct = [PeerLayer(one.dense, one.norms) for one in decoder.layers]
        self.layers = nn.ModuleList(distinct)
        self.head = nn.Parameter(decoder.head_VI, requires_grad=False)
        rows = list(range(decoder.rows))
        for block, cache in enumerate(decoder.caches):
            pairs = [cache.read([row], decoder.context) for row in rows]
            for name, tensors in zip(("keys", "values"), zip(*pairs, strict=True), strict=True):
                self.register_buffer(f"{name}{block}", torch.stack(tensors).contiguous())
        last = decoder.context - 1
        self.register_buffer("position", torch.full((1,), last, device=decoder.head_VI.device))
        cosine_TR, sine_TR = decoder.angles
        self.register_buffer("cosine", cosine_TR[last].clone())
        self.register_buffer("sine", sine_TR[last].clone())
        self.kept: list[dict[str, Tensor]] = []
        self.thresholds_SB = decoder.thresholds_SB
        self.farthest = 0.0  # from its threshold, of inputs that were judged otherwise than here

    def counting(self, kept: Sequence[Tensor]) -> Peer:
        """This one, with inputs of zero where a run did not count them.

        Args:
            kept: bool [B, I] of every block's sites; none: all count.
        """
        sites = len(SITES)
        self.kept = [
            dict(zip(SITES, kept[i : i + sites], strict=True)) for i in range(0, len(kept), sites)
        ]
        return self

    def in_channel_order(self) -> Peer:
        """This one, with its matrices laid out as our plan has dense ones: other sums."""
        for weight in self.parameters():
            if weight.ndim == 2:
                weight.data = weight.data.T.contiguous().T
        return self

    def forward(self, x_BI: Tensor) -> Tensor:
        """Logits [B, V]."""
        for block in range(self.sizes.layers):
            x_BI = self._block(block, x_BI)
        return F.linear(_norm(x_BI, torch.ones_like(x_BI[0])), self.head)

    def _block(self, block: int, x_BI: Tensor) -> Tensor:
        layer = self.layers[block % len(self.layers)]
        normed_BI = self._kept(block, "qkv", _norm(x_BI, layer.norm))
        out_BI = self._attention(block, F.linear(normed_BI, layer.qkv))
        x_BI = x_BI + F.linear(self._kept(block, "o", out_BI), layer.o)
        normed_BI = self._kept(block, "gate+up", _norm(x_BI, layer.mlp_norm))
        gate_BI, up_BI = F.linear(normed_BI, layer.gate_up).chunk(2, -1)
        hidden_BI = self._kept(block, "down", F.silu(gate_BI) * up_BI)
        return x_BI + F.linear(hidden_BI, layer.down)

    def _kept(self, block: int, site: str, x_BI: Tensor) -> Tensor:
        """Zeros where an input did not count."""
        if not self.kept:
            return x_BI
        kept_BI = self.kept[block][site]
        assert self.thresholds_SB is not None
        at = block * len(SITES) + SITES.index(site)
        distance_BI = x_BI.abs().double() - self.thresholds_SB[at][:, None]
        judged = distance_BI[(distance_BI > 0) != kept_BI].abs()
        self.farthest = max([self.farthest, *judged.tolist()])
        return torch.where(kept_BI, x_BI, 0)

    def _attention(self, block: int, qkv_BO: Tensor) -> Tensor:
        sizes, D = self.sizes, self.sizes.head_size
        kv = sizes.kv_heads * D
        q_BI, k_BI, v_BI = qkv_BO.split([sizes.heads * D, kv, kv], -1)
        keys_BKTD: Tensor = getattr(self, f"keys{block}")
        values_BKTD: Tensor = getattr(self, f"values{block}")
        turned_BKD = self._rotated(k_BI.view(-1, sizes.kv_heads, D))
        keys_BKTD.index_copy_(2, self.position, turned_BKD[:, :, None])
        values_BKTD.index_copy_(2, self.position, v_BI.view(-1, sizes.kv_heads, 1, D))
        q_BHD = self._rotated(q_BI.view(-1, sizes.heads, D))
        q_BKGD = q_BHD.view(len(q_BI), sizes.kv_heads, -1, D)
        out_BKGD = F.scaled_dot_product_attention(q_BKGD, keys_BKTD, values_BKTD)
        return out_BKGD.reshape(len(q_BI), -1)

    def _rotated(self, x_BHD: Tensor) -> Tensor:
        low, high = x_BHD.chunk(2, -1)
        turned = torch.cat([-high, low], -1)
        return (x_BHD * self.cosine + turned * self.sine).to(x_BHD.dtype)


def _norm(x_BI: Tensor, weight_I: Tensor) -> Tensor:
    return F.rms_norm(x_BI, x_BI.shape[-1:], weight_I, EPSILON)
