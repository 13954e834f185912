"""`create_app`: the routes, what stands in front of them, and the engine's start and end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from prune_llm import __version__
from prune_llm_server.engine import Engine
from prune_llm_server.errors import LOGGER, http_error
from prune_llm_server.exchange import ExchangeMiddleware
from prune_llm_server.lifecycle import Lifecycle
from prune_llm_server.metrics import Metrics
from prune_llm_server.routes import add_routes
from prune_llm_server.security import BodyMiddleware, KeyMiddleware
from prune_llm_server.service import Service
from prune_llm_server.settings import ServerSettings


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application over an engine; it knows no model.

    ``app.state.lifecycle`` is its `Lifecycle`: what drains and ends it.
    """
    lifecycle, metrics = Lifecycle(), Metrics(engine)
    app = FastAPI(
        title="prune_llm",
        version=__version__,
        summary="OpenAI's completions over a sparse model",
        lifespan=_lifespan(engine, lifecycle),
        redirect_slashes=False,
        redoc_url=None,
        exception_handlers={HTTPException: http_error},
    )
    app.state.lifecycle = lifecycle
    add_routes(app, Service(engine, settings, metrics), lifecycle)
    # the last one added is the first to see a request
    app.add_middleware(
        BodyMiddleware, max_bytes=settings.max_body_bytes, seconds=settings.read_seconds
    )
    if settings.api_keys:
        app.add_middleware(KeyMiddleware, keys=settings.api_keys)
    app.add_middleware(
        ExchangeMiddleware,
        lifecycle=lifecycle,
        metrics=metrics,
        write_seconds=settings.write_seconds,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _lifespan(
    engine: Engine, lifecycle: Lifecycle
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        # requests are answered from the beginning, with 503 until it has loaded
        starting = asyncio.create_task(_start(engine, lifecycle))
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.stop()

    return lifespan


async def _start(engine: Engine, lifecycle: Lifecycle) -> None:
    try:
        await engine.start()
    except Exception as error:  # raised again by the runner, when the server has ended
        lifecycle.failure = error
        lifecycle.stop_with(1)
        return
    lifecycle.loaded = True
    LOGGER.info("ready", extra={"fields": {"model": engine.info.model, **engine.info.details}})
