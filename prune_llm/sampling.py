"""From logits to a token: biases, penalties, temperature, top-k, top-p, min-p, seeded.

The order is vLLM's and transformers': bias, penalties, temperature, top-k, top-p, min-p. Shape
letter: V = vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# most likely tokens that usually hold top-p's mass: sorting the rest of a vocabulary costs more
# than the rest of a decode step
_LIKELY = 1024
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is chosen and when it ends; the names are vLLM's.

    Attributes:
        max_tokens: most tokens to add; 0, for those who only want the prompt's log-probabilities,
            is refused where an answer is asked for.
        temperature: 0 takes the most likely token, the lowest id of equals; so does one below 1e-5,
            by which float32 cannot divide.
        top_k: keep the k most likely tokens; 0: all.
        top_p: keep the most likely tokens that together have at least this probability.
        min_p: keep tokens at least this likely relative to the most likely one.
        presence_penalty, frequency_penalty: taken from the logits of the tokens drawn so far, once
            and for each time they were drawn (OpenAI's definition); from -2 to 2.
        repetition_penalty: divides the positive logits of tokens of prompt and answer, and
            multiplies the negative ones (Keskar et al. 2019, section 4.1); 1: none.
        logit_bias: added to the logits of some tokens, by id; from -100 to 100.
        seed: of the draws; None: another one every time.
        stop: texts that end the answer; they are not part of it.
        ignore_eos: go on behind an end-of-text token, for measurements.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens {self.max_tokens}: must be 0 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p}: must be in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} {getattr(self, name)}: must be in [-2, 2]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: must be above 0")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias {{{token}: {bias}}}: ids must be 0 or more, biases in [-100, 100]"
                )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: must be in [0, 2**63)")
        if "" in self.stop:
            raise ValueError("stop '': an empty text would end every answer at once")


def model_defaults(generation_config: Any) -> dict[str, Any]:
    """What the model's generation_config.json asks for: greedy unless it says do_sample."""
    if not getattr(generation_config, "do_sample", False):
        return {}
    asked = {
        name: getattr(generation_config, name, None)
        for name in ("temperature", "top_k", "top_p", "min_p")
    }
    return {"temperature": 1.0} | {name: v for name, v in asked.items() if v is not None}


NOTHING = -1  # in place of a token that a device drew, where no logit was a number
DRAWN = -1  # in place of a token that a device drew and keeps: nobody has read it yet
NO_NUMBER = "the model's logits are not numbers; check its weights, or try float32"


def no_embedding(token: int, embeddings: int) -> str:
    """Why a token that was drawn cannot be gone on from."""
    return f"token {token}: the model's head gave it, and it has {embeddings} embeddings"


class Sampler:
    """Draws one sequence's tokens, with one uniform random number for each that is not greedy.

    Attributes:
        params: what was asked for.
        prompt: tokens it was made with; drawn: how often each token was drawn since.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self.params = params
        self.prompt = frozenset(prompt)
        self.drawn: Counter[int] = Counter()
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def plain(self) -> bool:
        """Whether every draw is the argmax of the logits as they are."""
        return self.greedy and not self.adjusts

    @property
    def greedy(self) -> bool:
        return self.params.temperature < _LEAST_TEMPERATURE

    def filters(self, vocabulary: int) -> bool:
        """Whether some of the tokens may not be drawn."""
        params = self.params
        return 0 < params.top_k < vocabulary or params.top_p < 1 or params.min_p > 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by biases or penalties."""
        params = self.params
        penalties = params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1
        return any(penalties) or bool(params.logit_bias)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token, whatever is asked.

        Raises:
            ValueError: the model computed no number at all.
        """
        token = _largest(logits_V) if self.plain else self._draw(logits_V.cpu())
        self.note(token)
        return token

    def note(self, token: int) -> None:
        """A token was drawn, here or on a device."""
        self.drawn[token] += 1

    def uniform(self) -> float:
        """The random number in [0, 1) of the next token that is not greedy."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def _draw(self, logits_V: Tensor) -> int:
        if bool(logits_V.isnan().all()):
            raise ValueError(NO_NUMBER)
        if self.adjusts:
            logits_V = self._adjusted(logits_V)
        if self.greedy:
            return _largest(logits_V)
        tokens, probabilities = distribution(logits_V, self.params)
        return int(tokens[place_of(self.uniform(), probabilities)])

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """Bias, then penalties, in float32; the logits given stay as they are."""
        params, logits_V = self.params, logits_V.float().clone()
        for token, bias in params.logit_bias.items():
            logits_V[token] += bias
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted(self.prompt | self.drawn.keys()))
            values = logits_V[seen].double()  # float32 has no number for every penalty: 0 x inf
            penalty = params.repetition_penalty
            penalised = torch.where(values > 0, values / penalty, values * penalty)
            logits_V[seen] = penalised.float()
        for token, count in self.drawn.items():
            logits_V[token] -= params.presence_penalty + params.frequency_penalty * count
        return logits_V


def place_of(uniform: float | Tensor, probabilities: Tensor) -> Tensor:
    """The place that a random number in [0, 1) falls on, int64 [...]: the inverse of the
    distribution, in float64.

    Args:
        uniform: a number, or float64 [...]. probabilities: [..., n], of any sum above 0.
    """
    below = probabilities.double().cumsum(-1)
    mark = below[..., -1] * uniform
    return (below <= mark[..., None]).sum(-1)


def _largest(logits_V: Tensor) -> int:
    """The token with the largest logit that is a number, the lowest of equals.

    Raises:
        ValueError: none is a number.
    """
    best, missing = logits_V.nan_to_num(nan=-torch.inf).argmax(), logits_V.isnan().all()
    token, nothing = torch.stack([best, missing.long()]).tolist()  # a GPU is waited for once
    if nothing:
        raise ValueError(NO_NUMBER)
    return int(token)


def distribution(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn and their probabilities (float32, sum 1).

    The most likely come first, unless nothing is filtered: then all come in the order of their ids.
    There is always one, whatever the logits.
    """
    # infinite ones become the largest numbers there are
    least = torch.finfo(torch.float32).min
    scaled_V = (logits_V.float().cpu() / params.temperature).nan_to_num(nan=least)
    if 0 < params.top_k < len(scaled_V):
        values, tokens = scaled_V.topk(params.top_k)
        probabilities = values.softmax(0)
    elif params.top_p < 1 or params.min_p > 0:
        probabilities, tokens = _most_likely(scaled_V, params)
    else:
        return torch.arange(len(scaled_V)), scaled_V.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    kept = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    kept[0] = True  # a top-p near 0 is 0 in float32
    probabilities, tokens = probabilities[kept], tokens[kept]
    return tokens, probabilities / probabilities.sum()


def _most_likely(scaled_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Probabilities and tokens, sorted: at least all that top-p and min-p keep."""
    total = scaled_V.logsumexp(0)
    values, tokens = scaled_V.topk(min(_LIKELY, len(scaled_V)))
    probabilities = (values - total).exp()
    enough = (params.top_p < 1 and float(probabilities.sum()) >= params.top_p) or (
        float(probabilities[-1]) < params.min_p * float(probabilities[0])
    )
    if not enough and len(tokens) < len(scaled_V):
        values, tokens = scaled_V.sort(descending=True, stable=True)
        probabilities = (values - total).exp()
    return probabilities, tokens
