"""Train the weights that survived in a block until it does again what the dense model asks of it.

A solver looks at one linear at a time. Here the mask stays, and all kept weights of a block are
trained together on the calibration samples, from what the pruned model feeds the block, towards a
goal in the dense model (`goals`). That this recovers most of what pruning loses, whatever the
solver, is the finding of "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning"
(arXiv 2510.14444). Adam (Kingma and Ba 2015, arXiv 1412.6980) with a cosine rate, one sample a
step, in float32.

`CHECKS` times in its budget the weights are rounded as they will be stored, and their loss is
measured on samples that are not trained on. The best so far are what the block gets in the end; the
solver's own weights are the first of them, so that no block ends worse than it began. (The solver
has seen the held-out samples, the training has not: the comparison leans to the solver's side.)

In memory at once, beside the activations: the block in float32, its gradients and Adam's two
moments (16 bytes a weight); as stored, the block as it was, the best weights and those in question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prune_llm_kernels.wide_products import WideProducts

if TYPE_CHECKING:
    from prune_llm.goals import Goal

# of the samples, at least one, held out of the training
HELD_OUT = 1 / 12
# how often the held-out loss is measured, and how many times in a row it may fail to improve
CHECKS, PATIENCE = 8, 4
# share of the budget in which the rate rises to its full value
WARM_UP = 0.05
BETAS = (0.9, 0.95)
# of each block, where neither steps nor minutes are given
DEFAULT_STEPS = 400


def training_warnings(blocks: list[BlockReconstruction]) -> list[str]:
    """Of blocks that training did not help."""
    failed = sum(1 for block in blocks if block.kept_step == 0)
    if failed == 0:
        return []
    return [
        f"reconstruction: {failed} of {len(blocks)} blocks kept the solver's weights, because none "
        "that were trained did better on the held-out samples; give a lower --reconstruction-rate "
        "or more samples"
    ]


def default_rate(width: int) -> float:
    """A rate for hidden states of so many features: 0.03 for 64, less with the root of more.

    So that the output moves alike in models of any width, steps that agree in sign being summed
    over the inputs (the scaling of Yang et al. 2022, arXiv 2203.03466, relative to the weights'
    size). On trained models 64 and 192 wide 0.03 and 0.017 gain; 0.03 at 192 gains nothing.
    """
    return 0.03 * math.sqrt(64 / width)


@dataclass(frozen=True)
class Training:
    """How a block is trained: until the budget of steps or of seconds is spent, what comes first.

    Attributes:
        rate: the highest step of a weight, as a share of the root mean square of its matrix.
        seed: of the order of the samples.
    """

    steps: int | None
    seconds: float | None
    rate: float
    seed: int

    def spent(self, steps: int, seconds: float) -> float:
        """Share of the budget; 1 and above is the end."""
        by_steps = 0.0 if self.steps is None else steps / self.steps
        return max(by_steps, 0.0 if self.seconds is None else seconds / self.seconds)


@dataclass(frozen=True)
class BlockReconstruction:
    """What the training of one block did, as the report has it.

    Attributes:
        goal: what was matched, which says the unit of the losses (`goals`).
        before, after: mean loss over the ``held_out`` samples, weights rounded as stored;
            trained_before, trained_after: over as many of the samples that were trained on.
        steps: taken in all; kept_step: whose weights were kept, 0 where they are the solver's.
        ended: why: "budget", "no progress" on the held-out samples, "not finite".
    """

    name: str
    goal: str
    before: float
    after: float
    trained_before: float
    trained_after: float
    held_out: int
    steps: int
    kept_step: int
    seconds: float
    ended: str


def split_samples(count: int) -> tuple[list[int], list[int]]:
    """Which samples are trained on, and which, evenly spaced among them, are held out.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(
            f"samples {count}: reconstruction trains on some and measures on others; give at least "
            "2, and text for as many"
        )
    apart = max(1, round(count * HELD_OUT))
    held_out = [(2 * place + 1) * count // (2 * apart) for place in range(apart)]
    return [number for number in range(count) if number not in held_out], held_out


def train(
    name: str,
    parameters: list[Tensor],
    dtypes: list[torch.dtype],
    goal: Goal,
    training: Training,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], BlockReconstruction]:
    """Train the values of the parameters that are not zero; float32 leaves, changed in place.

    Args:
        dtypes: what each of them is stored in.
        goal: gives the loss of a sample with what the parameters hold.
        tick: called `CHECKS` times.

    Returns:
        The weights to store, each in its dtype, +0.0 where the parameter was zero.
    """
    started = time.perf_counter()
    trained_on, held_out = split_samples(goal.samples)
    some = trained_on[:: len(trained_on) // len(held_out)][: len(held_out)]
    run = _Run(parameters, dtypes, goal, training)
    first = run.candidate(held_out)
    before, trained_before = first.loss, run.loss_of(first.weights, some)
    best, ended = run.train(trained_on, held_out, first, tick)
    del first  # its weights, where there are better ones
    result = BlockReconstruction(
        name=name,
        goal=goal.name,
        before=before,
        after=best.loss,
        trained_before=trained_before,
        trained_after=run.loss_of(best.weights, some),
        held_out=len(held_out),
        steps=run.steps,
        kept_step=best.step,
        seconds=time.perf_counter() - started,
        ended=ended,
    )
    return best.weights, result


@dataclass(frozen=True)
class _Candidate:
    """Weights as they would be stored, after so many steps, and their held-out loss."""

    step: int
    weights: list[Tensor]
    loss: float


class _Run:
    """The training of one block: its parameters, where they stay zero, how far it is."""

    def __init__(
        self, parameters: list[Tensor], dtypes: list[torch.dtype], goal: Goal, training: Training
    ) -> None:
        self.parameters, self.dtypes, self.goal, self.training = parameters, dtypes, goal, training
        self.zeros = [parameter == 0 for parameter in parameters]
        self.steps, self._started = 0, time.perf_counter()

    def train(
        self,
        trained_on: list[int],
        held_out: list[int],
        best: _Candidate,
        tick: Callable[[], None],
    ) -> tuple[_Candidate, str]:
        """The best weights found, ``best`` among them, and why the training ended."""
        optimizer, order = self._optimizer(), shuffled(trained_on, self.training.seed)
        missed, ended = 0, "budget"
        for check in range(1, CHECKS + 1):
            if ended == "budget":
                if self._steps_to(check / CHECKS, optimizer, order):
                    found = self.candidate(held_out)
                    better = found.loss < best.loss
                    best, missed = (found, 0) if better else (best, missed + 1)
                    ended = "no progress" if missed == PATIENCE and check < CHECKS else ended
                else:
                    ended = "not finite"
            tick()
        return best, ended

    def _optimizer(self) -> torch.optim.Adam:
        groups = []
        for parameter in self.parameters:
            kept = int(torch.count_nonzero(parameter))
            size = float(parameter.square().sum(dtype=torch.float64) / max(1, kept)) ** 0.5
            groups.append({"params": [parameter], "full": self.training.rate * size})
        return torch.optim.Adam(groups, lr=0.0, betas=BETAS)

    def _steps_to(self, share: float, optimizer: torch.optim.Adam, order: Iterator[int]) -> bool:
        """Take steps until this share of the budget is spent; whether all losses were finite."""
        while (spent := self._spent()) < share:
            for group in optimizer.param_groups:
                group["lr"] = rate_factor(spent) * group["full"]
            optimizer.zero_grad(set_to_none=True)
            if not self._backward(next(order)):
                return False
            optimizer.step()
            self.steps += 1
        optimizer.zero_grad(set_to_none=True)
        return True

    def _spent(self) -> float:
        return self.training.spent(self.steps, time.perf_counter() - self._started)

    def _backward(self, sample: int) -> bool:
        """Gradients of the kept weights; False where the loss is not finite."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        # the block is float32; the dense model behind it, for the goal "logits", may be 16-bit
        with torch.enable_grad(), WideProducts():
            loss = self.goal.loss(sample)
            finite = bool(torch.isfinite(loss))
            if finite:
                loss.backward()
        for parameter, zero in zip(self.parameters, self.zeros, strict=True):
            parameter.requires_grad_(False)
            if parameter.grad is not None:  # None: an expert that the sample did not reach
                parameter.grad.masked_fill_(zero, 0.0)
        return finite

    def candidate(self, held_out: list[int]) -> _Candidate:
        """The weights of now, rounded."""
        weights = [
            # -0.0 + 0.0 is +0.0
            parameter.masked_fill(zero, 0.0).to(dtype) + 0.0
            for parameter, zero, dtype in zip(self.parameters, self.zeros, self.dtypes, strict=True)
        ]
        return _Candidate(self.steps, weights, self.loss_of(weights, held_out))

    @torch.no_grad()
    def loss_of(self, weights: list[Tensor], samples: list[int]) -> float:
        """Mean loss with these weights; infinite where it is not a number."""
        own = [parameter.clone() for parameter in self.parameters]
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)
        value = math.fsum(float(self.goal.loss(number)) for number in samples) / len(samples)
        for parameter, values in zip(self.parameters, own, strict=True):
            parameter.copy_(values)
        return value if math.isfinite(value) else math.inf


def rate_factor(spent: float) -> float:
    """Of the full rate, by the share of the budget spent: up in a line, down in a cosine."""
    if spent < WARM_UP:
        return (spent + WARM_UP / 10) / (1.1 * WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (spent - WARM_UP) / (1 - WARM_UP)))


def shuffled(numbers: list[int], seed: int) -> Iterator[int]:
    """All of them in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(numbers), generator=generator).tolist():
            yield numbers[place]
