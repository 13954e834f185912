"""The addresses, and what /openapi.json says of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from prune_llm import __version__
from prune_llm_server import responses
from prune_llm_server.chat import create_chat_completion
from prune_llm_server.completions import create_completion
from prune_llm_server.engine import EngineInfo, Unavailable
from prune_llm_server.errors import ApiError
from prune_llm_server.lifecycle import Lifecycle
from prune_llm_server.schemas import ChatRequest, CompletionRequest
from prune_llm_server.service import Service
from prune_llm_server.streaming import CONTENT_TYPE

_ERRORS = {
    400: "A field is wrong, or the prompt too long",
    401: "No API key, or one that is not known",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full; see Retry-After",
    500: "The engine failed",
    503: "Loading or shutting down; see Retry-After",
    504: "The request took longer than it may",
}


def add_routes(app: FastAPI, service: Service, lifecycle: Lifecycle) -> None:
    _add_generation(app, service)
    _add_models(app, service)
    _add_operations(app, service, lifecycle)
    keys = bool(service.settings.api_keys)
    app.openapi = lambda: _openapi(app, keys)  # type: ignore[method-assign]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"model": responses.ErrorBody, "description": _ERRORS[status]}
        for status in statuses
    }


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_generation(app: FastAPI, service: Service) -> None:
    stream: dict[str, Any] = {CONTENT_TYPE: {}}

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": responses.Completion, "content": stream}, **_errors(*_ERRORS)},
        openapi_extra=_body("CompletionRequest"),
    )
    async def completions(request: Request) -> Response:
        """Continue texts or token ids."""
        return await create_completion(service, request)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={
            200: {"model": responses.ChatCompletion, "content": stream},
            **_errors(*_ERRORS),
        },
        openapi_extra=_body("ChatRequest"),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer the messages of a chat."""
        return await create_chat_completion(service, request)


def _model(info: EngineInfo) -> dict[str, Any]:
    return {
        "id": info.model,
        "object": "model",
        "created": info.created,
        "owned_by": "prune_llm",
        "max_model_len": info.context,
        "levels": list(info.levels),
        "default_level": info.default_level,
    }


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/models",
        response_model=None,
        responses={200: {"model": responses.ModelList}, **_errors(401, 503)},
    )
    async def models() -> Response:
        """The model that is served, and its levels."""
        return JSONResponse({"object": "list", "data": [_model(service.engine.info)]})

    name = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}

    @app.get(
        "/v1/models/{model_id:path}",
        response_model=None,
        responses={200: {"model": responses.Model}, **_errors(401, 404, 503)},
        openapi_extra={"parameters": [name]},
    )
    async def model(request: Request) -> Response:
        """The same by its name."""
        asked, info = request.path_params["model_id"], service.engine.info
        if asked != info.model:
            text = f"The model `{asked[:100]}` does not exist; this server has `{info.model}`"
            raise ApiError(404, text, param="model", code="model_not_found")
        return JSONResponse(_model(info))


def _add_operations(app: FastAPI, service: Service, lifecycle: Lifecycle) -> None:
    health_shapes: dict[int | str, dict[str, Any]] = {
        200: {"model": responses.Health},
        503: {"model": responses.Health, "description": "Not so; the reason says why"},
    }

    @app.get("/health", response_model=None, responses=health_shapes)
    async def health() -> Response:
        """Whether it lives; 503 asks for a restart."""
        status = service.engine.status()
        return _health("ok" if status.healthy else "unhealthy", status.reason)

    @app.get("/ready", response_model=None, responses=health_shapes)
    async def ready() -> Response:
        """Whether to send requests here."""
        status = service.engine.status()
        if lifecycle.draining:
            return _health("draining", "the server is shutting down")
        if not status.ready:
            return _health("loading", status.reason)
        return _health("ok" if status.healthy else "unhealthy", status.reason)

    @app.get("/version", response_model=None, responses={200: {"model": responses.Version}})
    async def version() -> Response:
        """Of prune_llm, and facts of what is served."""
        try:
            info = service.engine.info
        except Unavailable:
            return JSONResponse({"version": __version__, "model": None, "details": {}})
        facts = {"version": __version__, "model": info.model, "details": dict(info.details)}
        return JSONResponse(facts)

    text = {CONTENT_TYPE_LATEST.partition(";")[0]: {"schema": {"type": "string"}}}

    @app.get("/metrics", response_class=Response, responses={200: {"content": text}})
    async def metrics() -> Response:
        """Numbers in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _health(status: str, reason: str) -> Response:
    body = {"status": status, "reason": reason}
    return JSONResponse(body, 200 if status == "ok" else 503)


def _openapi(app: FastAPI, keys: bool) -> dict[str, Any]:
    """FastAPI's schema, with the bodies it does not read itself and the keys."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes
    )
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for request in (CompletionRequest, ChatRequest):
        schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[request.__name__] = schema
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in found["paths"].items():
            for operation in item.values() if path.startswith("/v1/") else ():
                operation["security"] = [{"key": []}]
    app.openapi_schema = found
    return found
