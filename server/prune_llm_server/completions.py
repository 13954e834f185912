"""POST /v1/completions: texts or tokens continued, in OpenAI's older form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from prune_llm_server.engine import Answer, TokenReport
from prune_llm_server.errors import ApiError
from prune_llm_server.logprobs import LegacyLogprobs, joined, prompt_text
from prune_llm_server.plan import Plan, Planner, refusal
from prune_llm_server.schemas import CompletionRequest, Prompt
from prune_llm_server.sequences import Sequences
from prune_llm_server.service import Chunks, Service, record_of, usage
from prune_llm_server.streaming import EventStream

_MAX_TOKENS = 16


async def create_completion(service: Service, request: Request) -> Response:
    """Answer one request, whole or as a stream of events."""
    body, planner = await service.read(request, CompletionRequest)
    _check(body)
    planner.check_fields(len(body.prompt))
    plan = await _plan(service, request, body, planner)
    stream = bool(body.stream)
    sequences = await service.begin(request, plan, stream, body.prompt)
    writer = _Writer(request, body, plan, service.engine.info.model)
    if stream:
        return EventStream(writer.chunks(sequences), sequences.close)
    return JSONResponse(await writer.whole(sequences))


def _check(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refusal("best_of", f"{body.best_of}: only n sequences are drawn; leave it out")
    if body.max_tokens == 0 and not body.echo:
        raise refusal("max_tokens", "0: without echo there is nothing to answer")


async def _plan(
    service: Service, request: Request, body: CompletionRequest, planner: Planner
) -> Plan:
    prompts, rooms = [], []
    for prompt in body.prompt:
        ids = await _encoded(service, prompt) if isinstance(prompt, str) else prompt
        asked = body.max_tokens
        room = planner.room(ids, asked, "prompt")
        prompts.append(ids)
        rooms.append(min(room, _MAX_TOKENS) if asked is None else room)
    echo = bool(body.echo)
    # a prompt of token ids is repeated as text: the reports tell it
    needs_text = echo and not isinstance(body.prompt[0], str)
    logprobs = 0 if body.logprobs is None and needs_text else body.logprobs
    reported = echo and logprobs is not None
    return planner.plan(record_of(request).id, prompts, rooms, logprobs, reported)


async def _encoded(service: Service, prompt: str) -> tuple[int, ...]:
    try:
        return await service.engine.encode(prompt)
    except ValueError as error:
        raise ApiError(400, str(error), param="prompt", code="invalid_value") from None


@dataclass
class _Choice:
    """One sequence so far; its parts are what is not written yet."""

    logprobs: LegacyLogprobs
    texts: list[str] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class _Writer:
    """Puts answers into OpenAI's shapes."""

    def __init__(self, request: Request, body: CompletionRequest, plan: Plan, model: str) -> None:
        self._record = record_of(request)
        self._body, self._plan = body, plan
        self._head = {
            "id": f"cmpl-{self._record.id}",
            "object": "text_completion",
            "created": plan.created,
            "model": model,
        }
        self._choices: dict[int, _Choice] = {}

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        async for index, answer in sequences.answers():
            self._add(index, answer)
        choices = [self._taken(index) for index in sorted(self._choices)]
        return {**self._head, "choices": choices, "usage": usage(self._record)}

    async def chunks(self, sequences: Sequences) -> Chunks:
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        async for index, answer in sequences.answers():
            self._add(index, answer)
            choice = self._choices[index]
            if any(choice.texts) or choice.reports or choice.blocks or choice.finish_reason:
                yield {**self._head, "choices": [self._taken(index)], **more}
        if with_usage:
            yield {**self._head, "choices": [], "usage": usage(self._record)}

    def _add(self, index: int, answer: Answer) -> None:
        if index not in self._choices:
            self._choices[index] = self._opened(index, answer.prompt)
        choice = self._choices[index]
        choice.texts.append(answer.text)
        choice.reports += answer.reports
        choice.finish_reason = answer.finish_reason

    def _opened(self, index: int, reports: Sequence[TokenReport]) -> _Choice:
        """A choice that begins with its prompt, where that is to be repeated."""
        if not self._body.echo:
            return _Choice(LegacyLogprobs())
        prompt: Prompt = self._body.prompt[index // self._plan.n]
        text = prompt if isinstance(prompt, str) else prompt_text(reports)
        choice = _Choice(LegacyLogprobs(text), [text])
        if self._body.logprobs is not None:
            choice.blocks.append(choice.logprobs.of_prompt(reports))
        return choice

    def _taken(self, index: int) -> dict[str, Any]:
        """What is new of a choice."""
        choice = self._choices[index]
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = joined([*choice.blocks, choice.logprobs.of_answer(choice.reports)])
        text = "".join(choice.texts)
        choice.texts, choice.reports, choice.blocks = [], [], []
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
