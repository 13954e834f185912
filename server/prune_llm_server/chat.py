"""POST /v1/chat/completions: messages continued by the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from prune_llm_server.engine import Answer, TokenReport
from prune_llm_server.errors import ApiError
from prune_llm_server.logprobs import chat_logprobs
from prune_llm_server.plan import Plan, Planner, refusal
from prune_llm_server.schemas import ChatRequest
from prune_llm_server.sequences import Sequences
from prune_llm_server.service import Chunks, Service, record_of, usage
from prune_llm_server.streaming import EventStream

# templates know the role by its older name
_ROLES = {"developer": "system"}


async def create_chat_completion(service: Service, request: Request) -> Response:
    """Answer one request, whole or as a stream of events."""
    body, planner = await service.read(request, ChatRequest)
    _check(body)
    planner.check_fields(1)
    messages = [
        {"role": _ROLES.get(message.role, message.role), "content": message.content}
        for message in body.messages
    ]
    plan = await _plan(service, request, body, planner, messages)
    stream = bool(body.stream)
    sequences = await service.begin(request, plan, stream, messages)
    writer = _Writer(request, body, plan, service.engine.info.model)
    if stream:
        return EventStream(writer.chunks(sequences), sequences.close)
    return JSONResponse(await writer.whole(sequences))


def _check(body: ChatRequest) -> None:
    both = body.max_tokens, body.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise refusal("max_tokens", "is max_completion_tokens' older name; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise refusal("top_logprobs", "needs logprobs to be true")
    if body.response_format is not None and body.response_format.type != "text":
        raise refusal("response_format", 'only {"type": "text"} is supported')
    if body.modalities is not None and body.modalities != ["text"]:
        raise refusal("modalities", 'only ["text"] is supported')


async def _plan(
    service: Service,
    request: Request,
    body: ChatRequest,
    planner: Planner,
    messages: list[dict[str, str]],
) -> Plan:
    try:
        ids = await service.engine.encode_chat(messages)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    asked = body.max_completion_tokens
    asked = body.max_tokens if asked is None else asked
    room = planner.room(ids, asked, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return planner.plan(record_of(request).id, [ids], [room], logprobs, False)


@dataclass
class _Choice:
    """One sequence, collected."""

    text: list[str] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    finish_reason: str | None = None


class _Writer:
    """Puts answers into OpenAI's shapes."""

    def __init__(self, request: Request, body: ChatRequest, plan: Plan, model: str) -> None:
        self._record = record_of(request)
        self._body, self._plan = body, plan
        self._head = {
            "id": f"chatcmpl-{self._record.id}",
            "created": plan.created,
            "model": model,
        }

    async def whole(self, sequences: Sequences) -> dict[str, Any]:
        choices = [_Choice() for _ in self._plan.requests]
        async for index, answer in sequences.answers():
            choice = choices[index]
            choice.text.append(answer.text)
            choice.reports += answer.reports
            choice.finish_reason = answer.finish_reason
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": "".join(choice.text),
                        "refusal": None,
                    },
                    "logprobs": chat_logprobs(choice.reports) if self._body.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(self._record),
        }

    async def chunks(self, sequences: Sequences) -> Chunks:
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        for index in range(self._plan.n):
            yield self._chunk(with_usage, index, {"role": "assistant", "content": ""})
        async for index, answer in sequences.answers():
            if answer.text or answer.reports or answer.finish_reason:
                delta = {"content": answer.text} if answer.text else {}
                yield self._chunk(with_usage, index, delta, answer)
        if with_usage:
            chunk = {**self._head, "object": "chat.completion.chunk"}
            yield {**chunk, "choices": [], "usage": usage(self._record)}

    def _chunk(
        self, with_usage: bool, index: int, delta: dict[str, str], answer: Answer | None = None
    ) -> dict[str, Any]:
        reports = answer.reports if answer is not None and self._body.logprobs else ()
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(reports) if reports else None,
            "finish_reason": None if answer is None else answer.finish_reason,
        }
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**chunk, "usage": None} if with_usage else chunk
