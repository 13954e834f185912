"""What both kinds of completion do: read the body, start its sequences, count tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from prune_llm_server.engine import Engine
from prune_llm_server.errors import ApiError
from prune_llm_server.logs import RequestRecord
from prune_llm_server.metrics import Meter, Metrics
from prune_llm_server.plan import Plan, Planner
from prune_llm_server.schemas import GenerationFields, parse
from prune_llm_server.sequences import Sequences
from prune_llm_server.settings import ServerSettings

Body = TypeVar("Body", bound=GenerationFields)
Chunks = AsyncGenerator[dict[str, Any], None]


@dataclass(frozen=True)
class Service:
    """The engine as the routes see it."""

    engine: Engine
    settings: ServerSettings
    metrics: Metrics

    async def read(self, request: Request, schema: type[Body]) -> tuple[Body, Planner]:
        """The request's body, and what turns it into sequences.

        Raises:
            ApiError: 400, 404 (the model), 408, 413 or 415.
            Unavailable: the engine has not loaded.
        """
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json":
            raise ApiError(415, "send the body as JSON, with Content-Type: application/json")
        body = parse(schema, await request.body())
        planner = Planner(body, self.engine.info, self.settings)
        planner.check_model()
        return body, planner

    async def begin(self, request: Request, plan: Plan, stream: bool, prompt: Any) -> Sequences:
        """Start the sequences; returns when one has answered. ``prompt``: as the client sent it.

        Raises:
            ApiError, EngineError: the engine does not take them.
        """
        record = record_of(request)
        record.stream, record.level = stream, plan.level
        record.prompt_tokens = plan.prompt_tokens
        if self.settings.log_prompts:
            record.prompt = prompt
        lengths = [len(each.ids) for each in plan.requests]
        meter = Meter(self.metrics, record, self.engine.info.model, lengths, plan.n)
        return await Sequences.begin(self.engine, plan.requests, meter)


def record_of(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


def usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
