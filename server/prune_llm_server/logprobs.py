"""Log-probabilities in OpenAI's two shapes: of completions (legacy) and of chats."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from prune_llm.vocabulary import characters
from prune_llm_server.engine import Candidate, TokenReport

# JSON has no infinity; OpenAI and vLLM write this for a token that could not be drawn
_LOWEST = -9999.0


def number(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # also for NaN


def token_text(token: TokenReport | Candidate) -> str:
    r"""A token's text; where it ends inside a character its bytes, such as ``bytes:\xe2\x80``."""
    if token.bytes is None or "\ufffd" not in token.text:
        return token.text
    try:
        return bytes(token.bytes).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def prompt_text(reports: Sequence[TokenReport]) -> str:
    """The text of a prompt that was given as token ids."""
    return "".join(_pieces(reports))


def _pieces(reports: Sequence[TokenReport]) -> list[str]:
    return characters((report.text, report.bytes) for report in reports)


class LegacyLogprobs:
    """Collects one sequence's tokens for the shape of /v1/completions."""

    def __init__(self, prompt: str = "") -> None:
        """``prompt``: the text that the answer repeats."""
        self._prompt = prompt
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        """Offsets point into the prompt's text; tokens that are not part of it take no room."""
        offsets = []
        for piece in _pieces(reports):
            offsets.append(self._offset)
            shown = next((p for p in (piece, piece.lstrip(" ")) if self._follows(p)), "")
            self._offset += len(shown)
        self._offset = len(self._prompt)
        return self._block(reports, offsets)

    def _follows(self, piece: str) -> bool:
        return self._prompt.startswith(piece, self._offset)

    def of_answer(self, reports: Sequence[TokenReport]) -> dict[str, Any]:
        offsets = []
        for report in reports:
            offsets.append(self._offset)
            known = report.bytes is not None
            piece = self._decoder.decode(bytes(report.bytes or ())) if known else report.text
            self._offset += len(piece)
        return self._block(reports, offsets)

    def _block(self, reports: Sequence[TokenReport], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [token_text(report) for report in reports],
            "token_logprobs": [
                None if report.logprob is None else number(report.logprob) for report in reports
            ],
            "top_logprobs": [_top(report) for report in reports],
            "text_offset": offsets,
        }


def _top(report: TokenReport) -> dict[str, float] | None:
    """The token itself among the likeliest.

    Of tokens that read the same the likeliest stands, so that the token is the argmax exactly if
    its log-probability is the largest of these: clients tell greedy tokens by that.
    """
    if report.logprob is None:
        return None
    found = {token_text(report): number(report.logprob)}
    for candidate in report.top:
        if candidate.id != report.id:
            text = token_text(candidate)
            found[text] = max(found.get(text, _LOWEST), number(candidate.logprob))
    return found


def chat_logprobs(reports: Sequence[TokenReport]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_entry(report.text, report.bytes, report.logprob or 0.0),
                "top_logprobs": [
                    _entry(candidate.text, candidate.bytes, candidate.logprob)
                    for candidate in report.top
                ],
            }
            for report in reports
        ],
        "refusal": None,
    }


def _entry(text: str, token_bytes: tuple[int, ...] | None, logprob: float) -> dict[str, Any]:
    known = None if token_bytes is None else list(token_bytes)
    return {"token": text, "logprob": number(logprob), "bytes": known}


def joined(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Blocks of one sequence as one: their lists one behind the other."""
    whole: dict[str, Any] = {}
    for block in blocks:
        for name, value in block.items():
            whole[name] = whole.get(name, []) + value if isinstance(value, list) else value
    return whole
