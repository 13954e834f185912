"""What a request asks of the engine: checked against the model and the server's limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_llm.sampling import SamplingParams
from prune_llm_server.engine import EngineInfo, EngineRequest
from prune_llm_server.errors import ApiError
from prune_llm_server.schemas import GenerationFields
from prune_llm_server.settings import ServerSettings

_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "ignore_eos",
)
_SEEDS = 2**63


@dataclass(frozen=True)
class Plan:
    """The sequences of one request: n for each prompt, in the order of their index.

    Attributes:
        prompts: token ids. n: sequences of each. level: of all. created: Unix time.
    """

    prompts: tuple[tuple[int, ...], ...]
    n: int
    level: str
    requests: tuple[EngineRequest, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        """Every prompt counts once."""
        return sum(map(len, self.prompts))


class Planner:
    """Turns one request's fields into sequences. All raise ApiError with status 400 if they say no
    other."""

    def __init__(self, body: GenerationFields, info: EngineInfo, settings: ServerSettings) -> None:
        self._body, self._info, self._settings = body, info, settings

    def check_model(self) -> None:
        """Raises ApiError with status 404 where another model is asked for."""
        asked, served = self._body.model, self._info.model
        if asked != served:
            text = f"The model `{asked[:100]}` does not exist; this server has `{served}`"
            raise ApiError(404, text, param="model", code="model_not_found")

    def check_fields(self, prompts: int) -> None:
        """What can be refused before a prompt is encoded."""
        body = self._body
        if body.stream_options is not None and not body.stream:
            raise refusal("stream_options", "is only allowed when stream is true")
        most, n = self._settings.max_sequences, body.n or 1
        if prompts * n > most:
            param = "n" if n > 1 else "prompt"
            raise refusal(param, f"{prompts} prompts times n={n}: at most {most} together")
        for token in body.logit_bias or {}:
            if token >= self._info.vocabulary:
                raise refusal("logit_bias", f"token id {token} {self._not_in_vocabulary()}")

    def level(self) -> str:
        """The level that ``level`` or ``activation_sparsity`` names, or the default."""
        body, info = self._body, self._info
        named = body.level
        if named is not None and named not in info.levels:
            raise self._unknown_level("level", named)
        if body.activation_sparsity is None:
            return named or info.default_level
        share = body.activation_sparsity
        found = next((level for level in info.levels if _is_share(level, share)), None)
        if found is None:
            raise self._unknown_level("activation_sparsity", f"{100 * share:g}%")
        if named is not None and named != found:
            raise refusal("activation_sparsity", f"names level {found}, but level is {named}")
        return found

    def _unknown_level(self, param: str, level: str) -> ApiError:
        known = ", ".join(self._info.levels)
        return refusal(param, f"{level}: no such level; this model has: {known}")

    def room(self, prompt: Sequence[int], max_tokens: int | None, param: str) -> int:
        """Tokens that may follow; as many as fit if ``max_tokens`` is None."""
        context, length, settings = self._info.context, len(prompt), self._settings
        limit = settings.max_tokens_limit
        if not prompt:
            raise refusal(param, "is empty; give at least one token")
        for token in prompt:
            if token >= self._info.vocabulary:
                raise refusal(param, f"token id {token} {self._not_in_vocabulary()}")
        if settings.max_prompt_tokens is not None and length > settings.max_prompt_tokens:
            raise _too_long(
                f"the prompt has {length} tokens; this server takes at most "
                f"{settings.max_prompt_tokens}",
                param,
            )
        if max_tokens is not None and limit is not None and max_tokens > limit:
            raise refusal("max_tokens", f"{max_tokens}: this server gives at most {limit}")
        left = context - length
        if left < (1 if max_tokens is None else max_tokens) or left < 0:
            asked = "" if max_tokens is None else f" and {max_tokens} were asked for"
            raise _too_long(
                f"This model's maximum context length is {context} tokens; the prompt has "
                f"{length}{asked}. Shorten the prompt or lower max_tokens.",
                param,
            )
        if max_tokens is not None:
            return max_tokens
        return left if limit is None else min(left, limit)

    def _not_in_vocabulary(self) -> str:
        return f"is not in the vocabulary (0 to {self._info.vocabulary - 1})"

    def params(self, max_tokens: int, index: int) -> SamplingParams:
        """For the sequence of this index among the n of its prompt."""
        chosen: dict[str, Any] = dict(self._info.sampling)
        for name in _SAMPLING:
            value = getattr(self._body, name)
            if value is not None:
                chosen[name] = value
        chosen["top_k"] = max(0, chosen.get("top_k", 0))
        seed = self._body.seed
        try:
            return SamplingParams(
                **chosen,
                max_tokens=max_tokens,
                seed=None if seed is None else (seed + index) % _SEEDS,
                stop=tuple(self._body.stop or ()),
            )
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    def plan(
        self,
        request_id: str,
        prompts: Sequence[tuple[int, ...]],
        rooms: Sequence[int],
        logprobs: int | None,
        prompt_logprobs: bool,
    ) -> Plan:
        """All sequences; ``rooms``: tokens that may follow each prompt."""
        level, n = self.level(), self._body.n or 1
        requests = [
            EngineRequest(
                id=f"{request_id}-{number * n + index}",
                ids=prompt,
                params=self.params(room, index),
                level=level,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                seconds=self._settings.request_seconds,
            )
            for number, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
            for index in range(n)
        ]
        return Plan(tuple(prompts), n, level, tuple(requests))


def refusal(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _is_share(level: str, share: float) -> bool:
    """Whether a level's name is this percentage; "dense" is none at all."""
    if level == "dense":
        return share == 0
    try:
        return level.endswith("%") and abs(float(level[:-1]) - 100 * share) < 1e-6
    except ValueError:
        return False
