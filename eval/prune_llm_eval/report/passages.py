"""Passages of a text with what two models made of each token, as text to show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prune_llm_eval.report.notation import clean, number, percent

FLIPS_SHOWN = 3
# characters in front of a flipped token
BEFORE_SHOWN = 24
# nats of KL from which on a token has the darkest ground
MOST_NATS = 2.0


@dataclass(frozen=True)
class Flip:
    """Where the likeliest token changed, and what both models say with which probability."""

    before: str
    dense: str
    now: str


def whole_tokens(passage: dict[str, Any]) -> Iterator[tuple[str, str, bool, float]]:
    """What is shown of each token, what pointing at it tells, flipped, and 0 to 1 for its KL.

    A token inside a character has no text; its flip and its KL belong to the one that completes it.
    """
    flipped, nats, told = False, 0.0, ""
    for piece in passage["pieces"]:
        kl = piece["kl"] or 0.0
        if piece["flipped"] or not told or kl > nats:
            told = _tooltip(piece)
        flipped, nats = flipped or piece["flipped"], max(nats, kl)
        if piece["text"]:
            yield clean(piece["text"]), told, flipped, min(1.0, nats / MOST_NATS)
            flipped, nats, told = False, 0.0, ""


def _tooltip(piece: dict[str, Any]) -> str:
    own, dense = _choice(piece["choice"]), _choice(piece["dense_choice"])
    return (
        f"“{clean(piece['text'])}”: {percent(piece['dense_probability'], 0)} dense, "
        f"{percent(piece['probability'], 0)} now; KL {number(piece['kl'], 2)}; likeliest: "
        f"{dense} dense, {own} now"
    )


def _choice(choice: dict[str, Any]) -> str:
    return f"“{clean(choice['text'])}” {percent(choice['probability'], 0)}"


def flips(passage: dict[str, Any]) -> list[Flip]:
    """The worst."""
    pieces = passage["pieces"]
    places = [place for place, piece in enumerate(pieces) if piece["flipped"]]
    found = []
    for place in sorted(places, key=lambda n: -(pieces[n]["kl"] or 0.0))[:FLIPS_SHOWN]:
        before = passage["before"] + "".join(piece["text"] for piece in pieces[:place])
        piece = pieces[place]
        dense, now = _choice(piece["dense_choice"]), _choice(piece["choice"])
        found.append(Flip(clean(before[-BEFORE_SHOWN:]), dense, now))
    return found
