"""Requests as clients send them: OpenAI's fields, vLLM's extras, our activation levels.

Strict: a boolean is no number, a number no text, and a field that is not known is an error that
names it. Fields that change nothing here are taken; known ones that would change the answer but
are not implemented are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from prune_llm_server.errors import ApiError

MAX_STOPS = 16
MAX_BIASES = 1024
_MAX_STOP_CHARACTERS = 1024
# between 0 (greedy) and this, logits divided by it would overflow
_LOWEST_TEMPERATURE = 1e-4

Prompt = str | tuple[int, ...]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _wrong(message: str) -> PydanticCustomError:
    # braces would be read as a template's
    return PydanticCustomError("value", "{message}", {"message": message})


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """A text, texts, token ids, or lists of token ids, as one tuple."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise _wrong("must be a text, token ids, or a list of either")
    if not value:
        raise _wrong("is empty; give at least one token")
    if all(map(_is_token, value)):
        return (tuple(value),)
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        if not all(value):
            raise _wrong("holds an empty prompt; give at least one token")
        if all(_is_token(token) for item in value for token in item):
            return tuple(map(tuple, value))
    raise _wrong("must be all texts, all token ids (0 or more), or all lists of token ids")


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _wrong('must be an object such as {"50256": -100}')
    if len(value) > MAX_BIASES:
        raise _wrong(f"has {len(value)} entries; at most {MAX_BIASES}")
    found = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 16):
            raise _wrong(f"key {key[:20]!r} is not a token id")
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (number and -100 <= bias <= 100):
            raise _wrong(f"the bias of token {key} must be a number in [-100, 100]")
        found[int(key)] = float(bias)
    return found


def _temperature(value: float) -> float:
    if 0 < value < _LOWEST_TEMPERATURE:
        raise _wrong(f"must be 0 (greedy) or in [{_LOWEST_TEMPERATURE:g}, 2]")
    return value


def _share(value: Any) -> float:
    """0.4 or "40%" as a fraction."""
    number = value
    if isinstance(value, str):
        digits = value.removesuffix("%")
        plain = digits.replace(".", "", 1)
        if digits == value or not (plain.isascii() and plain.isdigit() and len(plain) < 16):
            raise _wrong('must be a fraction such as 0.4 or a percentage such as "40%"')
        number = float(digits) / 100
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1:
        raise _wrong('must be a fraction in [0, 1) such as 0.4, or a percentage such as "40%"')
    return float(number)


def _content(value: Any) -> str:
    """A text, or text parts, joined line by line as vLLM does."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong("must be a text or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _wrong('parts must be objects such as {"type": "text", "text": "..."}')
        if part["type"] != "text":
            raise _wrong(f"part type {part['type'][:40]!r} is not supported; this model reads text")
        if not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise _wrong('a text part holds "type" and "text", nothing else')
        texts.append(part["text"])
    return "\n".join(texts)


def _refused(value: Any) -> None:
    if value not in (None, [], {}):
        raise _wrong("not supported by this server")


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]
Stops = Annotated[
    list[StopText],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_stops, json_schema_input_type=StopText | list[StopText]),
]
Biases = Annotated[
    dict[int, float], PlainValidator(_biases, json_schema_input_type=dict[str, float])
]
Temperature = Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)]
Share = Annotated[float, PlainValidator(_share, json_schema_input_type=float | str)]
Content = Annotated[
    str,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]
Unsupported = Annotated[
    None,
    PlainValidator(_refused),
    WithJsonSchema({"type": "null", "description": "Not supported; a value is refused."}),
]
Ignored = Annotated[Any, Field(description="Taken, and changes nothing.")]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationFields(Strict):
    """What both kinds of completion share. Null means: not given."""

    model: str = Field(min_length=1, description="Name of the served model; see /v1/models.")
    n: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Temperature | None = Field(
        None, description="0 is greedy. If not given: as the model's generation_config.json says."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(None, description="0, -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = Field(None, description="By token id, from -100 to 100.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stops | None = Field(None, description=f"A text, or up to {MAX_STOPS}.")
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    level: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="Activation level, such as 40%; see /v1/models."
    )
    activation_sparsity: Share | None = Field(
        None, description="Names the level of this percentage: 0.4 or 40%."
    )
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    prompt: Prompts = Field(description="A text, token ids, or a list of either.")
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = Field(
        None, description="16 if not given; 0, with echo, asks for the prompt only."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Must equal n.")
    suffix: Unsupported = None


class Message(Strict):
    """One message of a chat; developer is read as system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None


class ResponseFormat(Strict):
    type: str


class ChatRequest(GenerationFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        None, description="What the context leaves if not given."
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        None, description="The older name of max_completion_tokens."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = Field(None, description='Only {"type": "text"}.')
    modalities: list[str] | None = Field(None, description='Only ["text"].')
    tool_choice: Ignored = None
    parallel_tool_calls: Ignored = None
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


Body = TypeVar("Body", bound=GenerationFields)


def parse(schema: type[Body], body: bytes) -> Body:
    """The request in a body.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise _bad_request(error.errors(include_url=False)[0]) from None


def _bad_request(error: ErrorDetails) -> ApiError:
    where = [str(part) for part in error["loc"]]
    param = ".".join(where)[:200] or None
    kind, message = error["type"], error["msg"]
    if kind == "json_invalid":
        reason = message.removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if kind == "missing" and param == "model":
        return ApiError(400, "you must provide a model parameter", param="model")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param)
    if kind == "extra_forbidden":
        text = f"Unrecognized request argument supplied: {param}"
        return ApiError(400, text, param=param, code="unknown_parameter")
    if param is None:
        return ApiError(400, f"the body: {message[:1].lower()}{message[1:]}")
    value = error["input"]
    scalar = value is None or isinstance(value, bool | int | float)
    shown = f" {value!r:.40}" if scalar or (isinstance(value, str) and len(value) < 40) else ""
    text = f"{param}{shown}: {message[:1].lower()}{message[1:]}"
    return ApiError(400, text, param=param, code="invalid_value")
