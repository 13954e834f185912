"""`prune-llm serve`: its options; puts the engine, the application and the runner together."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prune_llm_server.engine import EngineInfo
    from prune_llm_server.settings import ServerSettings

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_ENGINE_OPTIONS = (
    "max_queue",
    "max_rows",
    "chunk_tokens",
    "default_level",
    "device",
    "threads",
    "trust_remote_code",
    "load_seconds",
    "stuck_seconds",
    "max_restarts",
)
_COUNT = click.IntRange(min=1)
_ABOVE_0 = click.FloatRange(min=0, min_open=True)


@click.command("serve")
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="0: any free one.")
@click.option("--served-model-name", help="Name clients ask for.  [default: MODEL's last part]")
@click.option("--api-key-file", type=click.Path(dir_okay=False), help="API keys, one a line.")
@click.option("--max-body-mb", type=_ABOVE_0, default=4, show_default=True, help="Of a request.")
@click.option("--max-prompt-tokens", type=_COUNT, help="Of one prompt.  [default: the context]")
@click.option("--max-tokens-limit", type=_COUNT, help="Most tokens a request may ask for.")
@click.option("--request-seconds", type=_ABOVE_0, default=600, show_default=True, help="At most.")
@click.option("--max-queue", type=_COUNT, help="Sequences that may wait; more get status 429.")
@click.option("--max-rows", type=_COUNT, help="Sequences decoded at once.")
@click.option("--chunk-tokens", type=_COUNT, help="Prompt tokens computed in a step.")
@click.option("--kv-cache-gb", type=_ABOVE_0, help="Memory for keys and values.")
@click.option("--default-level", help="Activation level of requests that name none.")
@click.option("--no-levels", is_flag=True, help="Serve the dense level only.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=_COUNT, help="Threads; torch's choice if not given.")
@click.option("--cors-origin", "cors_origins", multiple=True, help="Web origin; repeatable.")
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log.")
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=30, show_default=True,
              help="For running requests, once told to end.")  # fmt: skip
@click.option("--load-seconds", type=_ABOVE_0, help="For loading the model.  [default: 1800]")
@click.option("--stuck-seconds", type=_ABOVE_0, help="Without a step the engine counts as stuck.")
@click.option("--max-restarts", type=click.IntRange(min=0), help="Of the engine, in ten minutes.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
def serve_command(model: str, **options: Any) -> None:
    """Serve MODEL over HTTP with OpenAI's API; keys also from $PRUNE_LLM_API_KEYS."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"serve needs {', '.join(missing)}, not installed: pip install 'prune-llm[serve]'"
        )
    sys.exit(_serve(model, options))


def _serve(model: str, options: dict[str, Any]) -> int:
    from prune_llm.config import select_device
    from prune_llm_server.app import create_app
    from prune_llm_server.engine import EngineError
    from prune_llm_server.errors import LOGGER
    from prune_llm_server.logs import configure_logging
    from prune_llm_server.runner import serve

    select_device(options["device"])  # one that does not exist: nothing is started for it
    settings = _settings(options)
    configure_logging(sys.stderr)
    if not settings.api_keys and not _is_loopback(settings.host):
        LOGGER.warning(
            f"{settings.host} can be reached from other machines and no API key is set: anybody "
            "may use this server; give --api-key-file"
        )

    def on_dead(code: int) -> None:
        app.state.lifecycle.stop_with(code)

    engine = _engine(model, options, on_dead)
    app = create_app(engine, settings)
    try:
        return serve(app, settings, lambda url: click.echo(_ready_line(url, engine.info)))
    except EngineError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except ValueError as error:
        raise ValueError(_in_options(str(error), options)) from None


def _settings(options: dict[str, Any]) -> ServerSettings:
    from prune_llm_server.security import read_api_keys
    from prune_llm_server.settings import ServerSettings

    key_file = options["api_key_file"]
    queue = options["max_queue"]
    most = ServerSettings.max_sequences
    return ServerSettings(
        host=options["host"],
        port=options["port"],
        api_keys=read_api_keys(None if key_file is None else Path(key_file), os.environ),
        max_body_bytes=int(options["max_body_mb"] * 1e6),
        max_prompt_tokens=options["max_prompt_tokens"],
        max_tokens_limit=options["max_tokens_limit"],
        # more than the queue holds could never be taken
        max_sequences=most if queue is None else min(most, queue),
        request_seconds=options["request_seconds"],
        drain_seconds=options["drain_seconds"],
        cors_origins=options["cors_origins"],
        log_prompts=options["log_prompts"],
    )


def _engine(model: str, options: dict[str, Any], on_dead: Callable[[int], None]) -> Any:
    """The engine that runs beside the server; ``on_dead`` takes an exit code."""
    embedded = importlib.import_module("prune_llm_server.embedded")
    given = {name: options[name] for name in _ENGINE_OPTIONS if options[name] is not None}
    if options["kv_cache_gb"] is not None:
        given["cache_bytes"] = int(options["kv_cache_gb"] * 1e9)
    config = embedded.EngineConfig(
        model=model,
        served_name=options["served_model_name"] or Path(model).absolute().name,
        levels=not options["no_levels"],
        **given,
    )
    return embedded.EmbeddedEngine(config, on_dead)


def _in_options(message: str, options: dict[str, Any]) -> str:
    """An error of the engine's budget, which counts bytes, in the words of the command line."""
    gigabytes = options["kv_cache_gb"]
    if gigabytes is None or not message.startswith("cache_bytes "):
        return message
    return f"kv_cache_gb {gigabytes:g}{message[message.index(':') :]}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ready_line(url: str, info: EngineInfo) -> str:
    line = f"serving {info.model} at {url}/v1: context {info.context} tokens"
    if (cache := info.details.get("cache_bytes")) is not None:
        line += f", KV cache {cache / 1e9:.3g} GB"
    return line
