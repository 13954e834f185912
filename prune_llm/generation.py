"""Continue a prompt: tokens as they come, text that ends at a stop, and what it took.

Knows no HTTP and prints nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prune_llm.activation.levels import DENSE
from prune_llm.decode_statistics import DecodeStatistics
from prune_llm.decoder import Decoder, PlanDecoder, new_decoder
from prune_llm.running_ahead import RunningAhead, runs_ahead
from prune_llm.sampling import Sampler, SamplingParams, model_defaults
from prune_llm.speculative import Draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | Messages


@dataclass(frozen=True)
class Generation:
    """An answer, whole or so far.

    Attributes:
        text: without the prompt, special tokens and the stop text.
        token_ids: what was drawn, with the token that ended it.
        finish_reason: "stop" (a stop text or the end-of-text token) or "length"; None while it
            goes on.
        prompt_tokens: length of the prompt.
        max_tokens: how many could follow: as asked, or what the model's context left.
        prefill_seconds: until the first token's logits; decode_seconds: for all that follow.
        decoder: what ran the tokens; device: where, "cpu" or "cuda:0"; statistics: what its steps
            did. On a GPU, which nobody waits for, they are counted when the answer ends, with up to
            two steps that were launched behind its end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    prompt_tokens: int
    max_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decoder: str
    statistics: DecodeStatistics = field(default_factory=DecodeStatistics)
    device: str = "cpu"

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps: the first token comes from the prompt's run."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """``text`` is new since the last piece and final; ``generation`` is everything so far."""

    text: str
    generation: Generation


def generate(
    model: PreTrainedModel | str | os.PathLike[str],
    prompt: Prompt,
    params: SamplingParams | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    level: str = DENSE,
    draft: Draft | None = None,
    device: str | None = None,
    **changes: Any,
) -> Generation:
    """Continue a prompt and return the whole answer; the arguments are those of `stream`."""
    generation: Generation | None = None
    for piece in stream(model, prompt, params, tokenizer, level, draft, device, **changes):
        generation = piece.generation
    assert generation is not None
    return generation


def stream(
    model: PreTrainedModel | str | os.PathLike[str],
    prompt: Prompt,
    params: SamplingParams | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    level: str = DENSE,
    draft: Draft | None = None,
    device: str | None = None,
    **changes: Any,
) -> Iterator[Piece]:
    """Continue a prompt and yield a piece for every token.

    Args:
        model: as `prune_llm.load` returned it, or a directory or hub name to load.
        prompt: text; token ids; or chat messages ``{"role": ..., "content": ...}`` for the model's
            chat template.
        params: see `SamplingParams`; None: what the model's generation_config.json says.
        tokenizer: None: the one beside the model.
        level: of activation sparsity for the tokens behind the prompt; see `new_decoder`.
        draft: propose tokens at a sparser level, verify them at ``level``.
        device: to load a model of that name to, as `prune_llm.load` takes it; None: "auto". A model
            that is loaded already stays where it is.
        changes: fields of SamplingParams by name, such as ``max_tokens=20``. Where the context
            leaves less room than max_tokens, `Generation.max_tokens` is smaller than asked.

    Raises:
        ValueError: a bad parameter, level or device, an empty prompt, one that leaves no room in
            the model's context, a model without tokenizer or chat template.
    """
    if isinstance(model, str | os.PathLike):
        from prune_llm.integration import load

        model = load(model, device=device or "auto")
    elif device is not None:
        raise ValueError(
            f"device {device!r}: the model is loaded already, on {model.device}; move it with "
            "model.to(...), or give its name"
        )
    if params is None:
        params = SamplingParams(**{**model_defaults(model.generation_config), **changes})
    elif changes:
        params = replace(params, **changes)
    if params.max_tokens < 1:
        raise ValueError(f"max_tokens {params.max_tokens}: must be at least 1")
    tokenizer = tokenizer or load_tokenizer(model)
    ids = prompt_ids(prompt, tokenizer)
    most = room(model, len(ids), params.max_tokens)
    decoder = new_decoder(model, len(ids) + most, level, draft)
    yield from decode(decoder, ids, replace(params, max_tokens=most), tokenizer, end_ids(model))


def load_tokenizer(
    model: PreTrainedModel, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a loaded model."""
    from transformers import AutoTokenizer

    directory = str(model.config.name_or_path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model {directory!r}: has no tokenizer that loads ({reason})") from None
    return tokenizer


def prompt_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a text, of chat messages by the model's template, or the ids themselves."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, verbose=False).input_ids)  # length is checked by `room`
    elif prompt and isinstance(prompt[0], Mapping):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat messages: the model's tokenizer has no chat template; give text")
        ids = tokenizer.apply_chat_template(
            list(prompt),
            add_generation_prompt=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )["input_ids"]
    else:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueError("prompt: is empty; give at least one token")
    if min(ids) < 0 or max(ids) >= len(tokenizer):
        raise ValueError(f"prompt: token ids must lie in [0, {len(tokenizer)})")
    return ids


def room(model: PreTrainedModel, prompt_tokens: int, max_tokens: int) -> int:
    """Tokens that may follow: as asked, or what the model's context leaves."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return max_tokens
    if prompt_tokens >= context:
        raise ValueError(
            f"prompt of {prompt_tokens} tokens: the model's context is {context} and leaves no "
            "room for an answer; shorten it"
        )
    return int(min(max_tokens, context - prompt_tokens))


def end_ids(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end a text."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    return frozenset([found] if isinstance(found, int) else found or [])


def decode(
    decoder: Decoder,
    ids: Sequence[int],
    params: SamplingParams,
    tokenizer: Any,
    ends: frozenset[int],
) -> Iterator[Piece]:
    """Prefill, then draw and decode token by token until something ends it."""
    sampler, text = Sampler(params, ids), AnswerText(tokenizer, ids, params.stop)
    drawn: list[int] = []
    started = time.perf_counter()
    logits_V = decoder.prefill(ids)
    if decoder.device.type == "cuda":  # which is still at it
        torch.cuda.synchronize(decoder.device)
    prefilled = time.perf_counter()
    for token in _tokens(decoder, sampler, logits_V, params.max_tokens):
        drawn.append(token)
        ended = token in ends and not params.ignore_eos
        last = len(drawn) == params.max_tokens
        reason = text.add(token, "stop" if ended else "length" if last else None)
        yield Piece(
            text.take(),
            Generation(
                text.text,
                tuple(drawn),
                reason,
                len(ids),
                params.max_tokens,
                prefilled - started,
                time.perf_counter() - prefilled,
                decoder.name,
                _statistics(decoder, reason is not None),
                str(decoder.device),
            ),
        )
        if reason is not None:
            return


def _tokens(decoder: Decoder, sampler: Sampler, logits_V: Tensor, most: int) -> Iterator[int]:
    """Tokens behind a prompt, as many as are asked for, up to ``most``."""
    if runs_ahead(decoder):
        assert isinstance(decoder, PlanDecoder)
        yield from RunningAhead(decoder, sampler, most).tokens(logits_V)
        return
    while True:
        token = sampler(logits_V)
        yield token
        logits_V = decoder.step(token)


def _statistics(decoder: Decoder, ended: bool) -> DecodeStatistics:
    if not ended and isinstance(decoder, PlanDecoder) and runs_ahead(decoder):
        return DecodeStatistics(decoder.level, ways=decoder.ways)
    return decoder.statistics()


class AnswerText:
    """The text of an answer, token by token, up to a stop text."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        def to_text(tokens: list[int]) -> str:
            text: str = tokenizer.decode(tokens, skip_special_tokens=True)
            return text

        self._writer, self._stops = TextWriter(to_text, prompt), StopWatch(stops)

    @property
    def text(self) -> str:
        """All that is certain so far."""
        return self._stops.text

    def add(self, token: int, finish_reason: str | None) -> str | None:
        """Add a token.

        Args:
            finish_reason: "stop" if it ends the text and is no part of it, "length" if it is the
                last one, None if more may follow.

        Returns:
            "stop" where a stop text was found, else ``finish_reason``.
        """
        stops, writer = self._stops, self._writer
        stopped = stops.add("" if finish_reason == "stop" else writer.add(token), last=False)
        if finish_reason is not None and not stopped:
            stops.add(writer.finish(), last=True)
        return "stop" if stops.stopped else finish_reason

    def take(self) -> str:
        """What became certain since the last call."""
        return self._stops.take()


class TextWriter:
    """Turns tokens into text as soon as it is certain.

    A token may be part of a character, and a tokenizer may treat the first word of a text in its
    own way: text is decoded behind some tokens of context, and what may still change is held back.
    """

    _CONTEXT = 6

    def __init__(self, to_text: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._to_text = to_text
        self._tokens = list(prompt[-self._CONTEXT :])
        self._start, self._read = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that is now certain; "" inside a character."""
        self._tokens.append(token)
        text = self._pending()
        return "" if text.endswith("\ufffd") else self._accept(text)

    def finish(self) -> str:
        """What was held back, with a replacement character where one is incomplete."""
        return self._accept(self._pending())

    def _pending(self) -> str:
        before = self._to_text(self._tokens[self._start : self._read])
        return self._to_text(self._tokens[self._start :])[len(before) :]

    def _accept(self, text: str) -> str:
        self._start = max(self._start, len(self._tokens) - self._CONTEXT)
        # the context must not begin inside a character
        while self._start and self._to_text(self._tokens[self._start :]).startswith("\ufffd"):
            self._start -= 1
        self._read = len(self._tokens)
        return text


class StopWatch:
    """Collects text up to the first stop text; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._ready = ""
        self.text = ""  # all that was released
        self.stopped = False

    def add(self, text: str, last: bool) -> bool:
        """Add text; ``last`` releases everything. Returns whether a stop text was found."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.stopped = last = True
        keep = 0 if last else max(map(self._beginning, self._stops), default=0)
        cut = len(self._held) - keep
        self._ready += self._held[:cut]
        self.text += self._held[:cut]
        self._held = "" if self.stopped else self._held[cut:]
        return self.stopped

    def take(self) -> str:
        """The text released since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def _beginning(self, stop: str) -> int:
        """Length of the longest end of the held text that ``stop`` begins with."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
