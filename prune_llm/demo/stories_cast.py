"""The story teller: a seeded chooser of words, and the characters and things it introduces.

A plot is a cast (what the story is about) and beats (how it may be told). A beat is a tuple of
templates of which one is told; ``[a|b]`` inside a template is one more choice; ``{hero.his}``
names the cast. Whatever a beat refers to comes from the cast, never from a second draw, so what
was lost is what is found and what was counted adds up.

Only `random.Random.random` is used: Python promises that its sequence never changes for a seed,
which it does not promise of `choice`, `sample` or `shuffle`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, TypeVar

from prune_llm.demo import stories_words as words

T = TypeVar("T")

_INNERMOST_CHOICE = re.compile(r"\[([^\[\]]*)\]")
# after `?"` or `!"` the sentence goes on ("Why?" asked Tom); after `."` it never does
_SENTENCE_START = re.compile(r'(^"?|[.?!] "?|\." )([a-z])')


def with_article(noun: str) -> str:
    """``"orange ball"`` -> ``"an orange ball"``; "honest" is our only word with a silent h."""
    return f"{'an' if noun.startswith(('a', 'e', 'i', 'o', 'u', 'honest')) else 'a'} {noun}"


def counted(number: int, noun: words.Countable) -> str:
    """``(1, apple)`` -> ``"one apple"``, ``(3, apple)`` -> ``"three apples"``."""
    return f"{words.NUMBERS[number]} {noun.one if number == 1 else noun.many}"


@dataclass(frozen=True, slots=True)
class Character:
    """Somebody with a name. The attributes are what a template may say: ``{hero.his}``."""

    name: str
    kind: str
    trait: words.Trait
    female: bool

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"

    @property
    def who(self) -> str:
        """``"a brave fox"``."""
        return f"{with_article(self.trait.word)} {self.kind}"

    @property
    def a_kind(self) -> str:
        return with_article(self.kind)

    @property
    def deed(self) -> str:
        return self.trait.deed


@dataclass(frozen=True, slots=True)
class Thing:
    """An object somebody owns, seeks or finds, told apart by its colour and its size."""

    noun: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"{self.colour} {self.noun}"

    @property
    def one(self) -> str:
        return with_article(self.noun)

    @property
    def a(self) -> str:
        return with_article(str(self))

    @property
    def full(self) -> str:
        return with_article(f"{self.size} {self.colour} {self.noun}")


Cast = dict[str, object]
Beats = tuple[tuple[str, ...], ...]


class Teller:
    """Makes the choices of one story; the same seed makes the same choices on every machine."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._taken: set[str] = set()

    def number(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(0, len(options) - 1)]

    def pick_new(self, options: Sequence[T]) -> T:
        """Like `pick`, but never what this story has had before, so two friends differ in name."""
        fresh = [option for option in options if repr(option) not in self._taken]
        choice = self.pick(fresh)
        self._taken.add(repr(choice))
        return choice

    def character(self) -> Character:
        female = self.number(0, 1) == 0
        name = self.pick_new(words.SHE_NAMES if female else words.HE_NAMES)
        human = "girl" if female else "boy"
        kind = human if self.number(0, 1) == 0 else self.pick(words.ANIMALS)
        return Character(name, kind, self.pick_new(words.TRAITS), female)

    def elder(self) -> Character:
        female = self.number(0, 1) == 0
        name = self.pick_new(words.SHE_ELDERS if female else words.HE_ELDERS)
        human = "woman" if female else "man"
        return Character(name, human, self.pick_new(words.TRAITS), female)

    def thing(self) -> Thing:
        """A new object: no second one of the story has its noun or its colour."""
        noun = self.pick_new(words.OBJECTS)
        return Thing(noun, self.pick_new(words.COLOURS), self.pick(words.SIZES))

    def tell(self, template: str, cast: Cast) -> str:
        """Resolve every ``[this|or that]`` (they nest), fill in the cast, set the capitals."""
        while match := _INNERMOST_CHOICE.search(template):
            chosen = self.pick(match[1].split("|"))
            template = template[: match.start()] + chosen + template[match.end() :]
        sentence = " ".join(template.format(**cast).split())
        return _SENTENCE_START.sub(lambda start: start[1] + start[2].upper(), sentence)


class Plot(NamedTuple):
    """One kind of story."""

    cast: Callable[[Teller], Cast]
    beats: Beats
