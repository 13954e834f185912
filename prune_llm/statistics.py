"""What calibration accumulates about the input of a site: one pass serves every method.

A site is one input tensor shared by several linears (q, k, v; gate, up; o; down). Shape letters:
T = tokens, I = input features. Products are summed in float32, with TF32 off; squares in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from prune_llm.ranks import Ranks
from prune_llm_kernels import tokens
from prune_llm_kernels.wide_products import pays


class Needs(IntFlag):
    """What a method must know about its inputs; norms come with everything else."""

    NOTHING = 0
    NORMS = 1
    MEANS = 2 | NORMS
    GRAM = 4 | NORMS


class InputStatistics:
    """Sums over the calibration tokens of one site.

    Attributes:
        tokens: rows seen.
        square_sum_I: sum over tokens of x_i^2, float32 [I]; float64 until `finish`.
        sum_I: sum over tokens of x_i, float64 [I]; None where no method needs it.
        sample_TI: a few evenly spaced tokens, in the model's dtype, on which the layer error is
            measured (a few hundred give it to some per cent, at a hundredth of the Gram's cost).
        paired: of the tokens, those whose input in the dense model is known.
        shift_DI: sum over tokens of (r~ - r) x^T where the linear's output is added to r (r~ in the
            dense model); None where it is added to nothing.
    """

    def __init__(
        self, width: int, device: torch.device, needs: Needs, dense_target: bool = False
    ) -> None:
        self.tokens = self.paired = 0
        self.square_sum_I = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum_I = torch.zeros_like(self.square_sum_I) if Needs.MEANS in needs else None
        self._gram = _GramSum(width, device) if Needs.GRAM in needs else None
        self._difference_II: Tensor | None = None
        if dense_target:
            self._difference_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.shift_DI: Tensor | None = None
        self._samples: list[Tensor] = []
        self._dense_samples: list[Tensor] = []
        self._shift_samples: list[Tensor] = []

    def update(self, x_TI: Tensor, sample: int = 0) -> None:
        """Add T tokens; ``sample`` of them, evenly spaced, are kept for the layer error."""
        x_TI = x_TI.reshape(-1, x_TI.shape[-1])
        self.tokens += x_TI.shape[0]
        if self.sum_I is not None:
            self.sum_I += x_TI.float().sum(dim=0)
        if self._gram is not None:
            self._gram.add(x_TI)
        elif tokens.supports_rows(x_TI):
            tokens.add_squares(self.square_sum_I, x_TI)
        else:
            # on a CPU seven times faster than vector_norm over columns
            self.square_sum_I += x_TI.to(torch.float32, copy=True).square_().sum(dim=0)
        if sample > 0:
            self._samples.append(_spaced(x_TI, sample))

    def update_pair(
        self,
        x_TI: Tensor,
        dense_TI: Tensor,
        paired: int,
        shift_TD: Tensor | None = None,
        sample: int = 0,
    ) -> None:
        """Add T tokens and what the dense model has in their place.

        Args:
            paired: so many of the dense rows are the dense model's, the others are our own.
            shift_TD: r~ - r of each token, float32, see `shift_DI`.
        """
        assert self._difference_II is not None
        self.update(x_TI, sample)
        self.paired += paired
        if paired > 0:
            _add_product(self._difference_II, dense_TI.float() - x_TI.float(), x_TI)
        if shift_TD is not None:
            if self.shift_DI is None:
                self.shift_DI = shift_TD.new_zeros(shift_TD.shape[1], x_TI.shape[1])
            _add_product(self.shift_DI, shift_TD, x_TI)
        if sample > 0:
            self._dense_samples.append(_spaced(dense_TI, sample))
            if shift_TD is not None:
                self._shift_samples.append(_spaced(shift_TD, sample))

    def add_up(self, ranks: Ranks) -> None:
        """Make these the sums over all processes; call before `finish`."""
        if ranks.count == 1:
            return
        counts = ranks.of_all((self.tokens, self.paired))
        self.tokens, self.paired = (sum(numbers) for numbers in zip(*counts, strict=True))
        shapes = [shape for shape in ranks.of_all(_shape(self.shift_DI)) if shape is not None]
        if shapes and self.shift_DI is None:
            self.shift_DI = torch.zeros(shapes[0], device=self.square_sum_I.device)
        gram_II = None if self._gram is None else self._gram.sum_II
        sums = (self.square_sum_I, self.sum_I, gram_II, self._difference_II, self.shift_DI)
        for tensor in sums:
            if tensor is not None:
                ranks.sum_(tensor)
        for kept in (self._samples, self._dense_samples, self._shift_samples):
            device = self.square_sum_I.device
            parts = ranks.of_all([rows.cpu() for rows in kept])
            kept[:] = [rows.to(device) for part in parts for rows in part]

    def finish(self) -> None:
        """Call once after the last update; afterwards `gram_II` and `square_sum_I` are final."""
        if self._gram is not None:
            self._gram.mirror()
            self.square_sum_I = self._gram.sum_II.diagonal().clone()
        self.square_sum_I = self.square_sum_I.to(torch.float32)

    @property
    def gram_II(self) -> Tensor:
        """sum over tokens of x x^T, float32 [I, I], symmetric. ValueError if not accumulated."""
        if self._gram is None:
            raise ValueError("this method needs the Gram matrix, which calibration did not collect")
        return self._gram.sum_II

    @property
    def difference_II(self) -> Tensor:
        """sum over tokens of (x~ - x) x^T with x~ of the dense model, float32 [I, I]."""
        assert self._difference_II is not None, "calibration ran without the dense model"
        return self._difference_II

    @property
    def sample_TI(self) -> Tensor:
        return torch.cat(self._samples)

    def norms_I(self) -> Tensor:
        """Root mean square over sequences up to a constant: ||X_i||_2, float32 [I] (Wanda)."""
        return self.square_sum_I.sqrt()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance over the tokens, float32 [I]; the variance is above zero (DSnoT)."""
        assert self.sum_I is not None, "this method needs means, which calibration did not collect"
        mean_I = self.sum_I / max(self.tokens, 1)
        variance_I = self.square_sum_I.double() / max(self.tokens, 1) - mean_I.square()
        return mean_I.float(), variance_I.clamp_min_(1e-30).float()

    def relative_error(self, weight_OI: Tensor, pruned_OI: Tensor) -> LayerError | None:
        """||(W - W') X||_F^2 / ||W X||_F^2 over the sampled tokens.

        With a dense target ||W X~ + R~ - R - W' X||_F^2 / ||W X~||_F^2, X~ what the dense model
        reads and R what the output is added to.
        Products in bfloat16 where the tokens are and that is fast: it rounds each to 0.4 %, far
        below the sample's own error. None where no token was seen.
        """
        if self.tokens == 0:
            return None
        x_TI = self.sample_TI
        if x_TI.dtype != torch.bfloat16 or pays(x_TI, len(x_TI)):
            x_TI = x_TI.float()
        weight_IO = weight_OI.T.to(x_TI.dtype)
        lost_TO = x_TI @ (weight_OI - pruned_OI).T.to(x_TI.dtype)
        dense_TI = x_TI
        if self._dense_samples:
            dense_TI = torch.cat(self._dense_samples).to(x_TI.dtype)
            lost_TO += (dense_TI - x_TI) @ weight_IO
        if self._shift_samples:
            lost_TO += torch.cat(self._shift_samples).to(x_TI.dtype)
        whole = _square_sum(dense_TI @ weight_IO)
        lost = _square_sum(lost_TO)
        return LayerError(lost / whole if whole > 0 else 0.0, x_TI.shape[0])


def statistics_nbytes(width: int, needs: Needs, dense_target: bool = False) -> int:
    """What `InputStatistics` of a site takes at least: its matrices and sums."""
    matrices = (Needs.GRAM in needs) + dense_target
    vectors = 1 + (Needs.MEANS in needs)
    return matrices * 4 * width * width + vectors * 8 * width


@dataclass(frozen=True, slots=True)
class LayerError:
    """Relative squared error of a linear's output, and the number of tokens it stands on."""

    value: float
    tokens: int


def _add_product(sum_DI: Tensor, left_TD: Tensor, x_TI: Tensor) -> None:
    """sum += left^T x. Where x is bfloat16, left may be rounded to it: it is a difference, so that
    the error is a small share of what the sum says of it."""
    if tokens.supports_gram(x_TI):
        tokens.cross_add(sum_DI, left_TD.to(x_TI.dtype), x_TI)
    else:
        sum_DI.addmm_(left_TD.T, x_TI.float())


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _spaced(x_TI: Tensor, count: int) -> Tensor:
    stride = max(1, x_TI.shape[0] // count)
    return x_TI[::stride][:count].clone()


def _square_sum(y: Tensor) -> float:
    return float(y.float().square_().sum(dtype=torch.float64))


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, which NaN passes into."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


class _GramSum:
    """G += X^T X, only the blocks on and below the diagonal: half the work of the full product."""

    # measured on 1024 and 2816 inputs: 256 takes 0.57-0.67 of the full product, 768 and up 0.64-1
    PANEL = 256

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        panels = max(1, round(width / self.PANEL))
        self._edges = [i * width // panels for i in range(panels + 1)]

    def add(self, x_TI: Tensor) -> None:
        if tokens.supports_gram(x_TI):
            tokens.gram_add(self.sum_II, x_TI)
            return
        x_TI = x_TI.float()
        for start, end in zip(self._edges[:-1], self._edges[1:], strict=True):
            rows = self.sum_II[start:end, :end]
            torch.addmm(rows, x_TI[:, start:end].T, x_TI[:, :end], out=rows)

    def mirror(self) -> None:
        """Fill in what lies above the diagonal, in place."""
        for start, end in zip(self._edges[:-1], self._edges[1:], strict=True):
            self.sum_II[:start, start:end] = self.sum_II[start:end, :start].T
            square = self.sum_II[start:end, start:end]
            square.copy_(square.tril() + square.tril(-1).T)


class disable_tf32:
    """Full float32 matrix products on CUDA while statistics and solvers run."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_exc: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._before
