"""A deterministic teller of short stories: text to train, calibrate and measure a small model on.

The same number tells the same story on every machine and Python version. A story belongs to
exactly one split, by the hash of its text, so no split can hold a text of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from types import MappingProxyType

from prune_llm.demo import stories_deeds as deeds
from prune_llm.demo import stories_things as things
from prune_llm.demo import stories_words as words
from prune_llm.demo.stories_cast import Beats, Cast, Plot, Teller

SPLITS = ("train", "calibration", "held_out")
SEPARATOR = "<|story|>"
"""The line between two stories of `text`."""

PLOTS = MappingProxyType(
    {
        "lost": Plot(things.lost, things.LOST),
        "sharing": Plot(things.sharing, things.SHARING),
        "stuck": Plot(things.stuck, things.STUCK),
        "shopping": Plot(things.shopping, things.SHOPPING),
        "present": Plot(things.present, things.PRESENT),
        "garden": Plot(things.garden, things.GARDEN),
        "trade": Plot(things.trade, things.TRADE),
        "race": Plot(deeds.race, deeds.RACE),
        "riddle": Plot(deeds.riddle, deeds.RIDDLE),
        "errand": Plot(deeds.errand, deeds.ERRAND),
        "accident": Plot(deeds.accident, deeds.ACCIDENT),
        "baking": Plot(deeds.baking, deeds.BAKING),
        "rescue": Plot(deeds.rescue, deeds.RESCUE),
        "skill": Plot(deeds.skill, deeds.SKILL),
    }
)

OPENING: Beats = (
    (
        "Once upon a time there was {hero.who} named {hero}. {hero.he} lived in {village}.",
        "In {village} there lived {hero.who} named {hero}.",
        "{hero} was {hero.a_kind} from {village}. Everybody knew that {hero.he} was [very |]"
        "{hero.trait.word}.",
        "This is a story about {hero.who} named {hero}.",
        "Long ago, {hero.who} named {hero} had a home near {village}.",
    ),
)

# the hash of a story modulo 4 says where it belongs: half of all stories are for training
_SPLIT_OF_REMAINDER = ("train", "train", "calibration", "held_out")
# room for looking: 256 draws all miss a split of one quarter with probability 1e-32
_SEEDS_PER_STORY = 256
_SEEDS_PER_SPLIT = 10**12


def story(seed: int) -> str:
    """Tell the story of `seed`: one paragraph of about 80 to 200 words."""
    teller = Teller(seed)
    cast = common_cast(teller)
    plot = PLOTS[teller.pick(tuple(PLOTS))]
    cast.update(plot.cast(teller))
    return " ".join(_told(teller, cast, OPENING + plot.beats))


def _told(teller: Teller, cast: Cast, beats: Beats) -> Iterator[str]:
    """Choose and tell one template of each beat."""
    weather_known = False
    for beat in beats:
        # the weather can only change in the end if it was told before
        template = teller.pick([t for t in beat if weather_known or "{weather.ending}" not in t])
        weather_known = weather_known or "{weather.cause}" in template
        yield teller.tell(template, cast)


def split_of(text: str) -> str:
    """Name the split a story belongs to."""
    return _SPLIT_OF_REMAINDER[sha256(text.encode()).digest()[0] % 4]


def stories(split: str, count: int, start: int = 0) -> list[str]:
    """Return `count` stories of a split, beginning at its story number `start`.

    Raises:
        ValueError: `split` is none of `SPLITS`, or a number is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if count < 0 or start < 0:
        raise ValueError(f"count is {count} and start is {start}; neither may be negative")
    return [_story_of_split(split, index) for index in range(start, start + count)]


def text(split: str, count: int, start: int = 0) -> str:
    """Return the same stories as one text, with a `SEPARATOR` line between each two."""
    return f"\n{SEPARATOR}\n".join(stories(split, count, start))


def _story_of_split(split: str, index: int) -> str:
    """Return story number `index`: the first from its own seeds that belongs to the split."""
    first = SPLITS.index(split) * _SEEDS_PER_SPLIT + index * _SEEDS_PER_STORY
    told = (story(seed) for seed in range(first, first + _SEEDS_PER_STORY))
    return next(text for text in told if split_of(text) == split)


def common_cast(t: Teller) -> Cast:
    """What every story may mention, whatever its plot."""
    return {
        "hero": t.character(),
        "friend": t.character(),
        "village": t.pick_new(words.VILLAGES),
        "weather": t.pick(words.WEATHERS),
        "time": t.pick(words.TIMES),
        "day": t.pick(words.DAYS),
        "game": t.pick(words.GAMES),
        "good": t.pick_new(words.GOODS),
        "sight": t.pick(t.pick(words.PLACES).sights),
        "feeling": t.pick(words.FEELINGS),
        "hours": words.NUMBERS[t.number(2, 5)],
        "parcel": t.pick(words.PARCELS),
    }
