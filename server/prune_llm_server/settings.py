"""What the operator decides: limits, keys, addresses. One frozen dataclass, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ServerSettings:
    """How the application and its runner behave.

    Attributes:
        host, port: to listen on; port 0 takes any free one.
        api_keys: one of them must be sent with every request below /v1; none: open to all.
        max_body_bytes: of a request, however it is sent.
        max_prompt_tokens: of one prompt; None: what the model's context takes.
        max_tokens_limit: most tokens a request may ask for; None: what the context leaves.
        max_sequences: that one request may ask for, prompts times n.
        request_seconds: a request may take, waiting included; None: as long as it needs.
        read_seconds: for a request's headers, and for its body, to arrive.
        write_seconds: a write may be held up by a client that does not read.
        drain_seconds: running requests get to finish once the server was told to end.
        cors_origins: web pages of these origins may call the server from a browser; none: no page.
        log_prompts: prompts appear in the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 4_000_000
    max_prompt_tokens: int | None = None
    max_tokens_limit: int | None = None
    max_sequences: int = 128
    request_seconds: float | None = 600.0
    read_seconds: float = 30.0
    write_seconds: float = 30.0
    drain_seconds: float = 30.0
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port {self.port}: must be in [0, 65535]; 0 takes any free one")
        for name in ("max_body_bytes", "max_prompt_tokens", "max_tokens_limit", "max_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be at least 1")
        for name in ("request_seconds", "read_seconds", "write_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value}: must be above 0")
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds {self.drain_seconds}: must be 0 or more")
