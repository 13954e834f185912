"""What single tokens look like: their text, and the bytes behind it."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """The tokens of a tokenizer, one by one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._kinds = _decoder_kinds(tokenizer)
        self._spelled: dict[int, tuple[str, tuple[int, ...] | None]] = {}

    def spell(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        """Text, with U+FFFD for what is no whole character, and bytes; None for a special token."""
        if token not in self._spelled:
            self._spelled[token] = self._spell(token)
        return self._spelled[token]

    def name(self, token: int) -> str:
        """Its text where it stands alone: bytes such as <0xC3> if it is no whole character, and
        <token 7> if it has no text."""
        text, raw = self.spell(token)
        if raw is not None and bytes(raw) != text.encode():
            return "".join(f"<0x{byte:02X}>" for byte in raw)
        return text or f"<token {token}>"

    def _spell(self, token: int) -> tuple[str, tuple[int, ...] | None]:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # between the last token and the size of the embedding
            return "", ()
        if token in self._special:
            return piece, None
        # an added token is spelled as its text is
        raw = piece.encode() if token in self._added else self._bytes(piece)
        if raw is None:
            raw = self._behind_itself(token).encode()
        return raw.decode(errors="replace"), tuple(raw)

    def _behind_itself(self, token: int) -> str:
        """Its text inside of one: what begins a text often has no space in front."""
        once: str = self._tokenizer.decode([token])
        twice: str = self._tokenizer.decode([token, token])
        return twice[len(once) :]

    def _bytes(self, piece: str) -> bytes | None:
        """By the rules of the tokenizer's decoder; None where it has others than these two."""
        if "ByteLevel" in self._kinds:
            table = _byte_letters()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else None
        if self._kinds & {"ByteFallback", "Metaspace"}:
            if match := _BYTE.fullmatch(piece):
                return bytes([int(match[1], 16)])
            return piece.replace("\u2581", " ").encode()
        return None


def characters(spelled: Iterable[tuple[str, Sequence[int] | None]]) -> list[str]:
    """The characters that each of consecutive tokens completes; together they are the text.

    Args:
        spelled: text and bytes of each, as `Vocabulary.spell` gives them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = []
    for text, raw in spelled:
        if raw is not None:
            pieces.append(decoder.decode(bytes(raw)))
        else:
            pieces.append(decoder.decode(b"", final=True) + text)
            decoder.reset()
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def _decoder_kinds(tokenizer: Any) -> frozenset[str]:
    """Kinds of the steps of a fast tokenizer's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset()
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return frozenset()
    return frozenset(step["type"] for step in [decoder, *decoder.get("decoders", [])])


@cache
def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (Radford et al. 2019): itself where
    it prints, else the next one from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    letters = {chr(byte): byte for byte in printing}
    return letters | {chr(0x100 + n): byte for n, byte in enumerate(others)}
