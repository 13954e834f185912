"""`eval --against`: where the model differs most from the dense one, on a screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prune_llm.cli_tables import new_table, short

if TYPE_CHECKING:
    from prune_llm_eval.compare import ModelQuality
    from prune_llm_eval.forgetting import Bucket, Forgotten, Passage, PassageToken

COLUMNS = ("", "tokens", "KL", "flipped", "nats/token")
HURT_SHOWN = 8
FLIPS_SHOWN = 2
# characters in front of a flipped token
BEFORE_SHOWN = 20
# what would be printed as 0.00 is left out: packed kernels add in another order
SHOWN_NATS = 0.005
OPEN, CLOSE = "‹", "›"


def print_forgotten(console: Console, row: ModelQuality, first: ModelQuality) -> None:
    """What the means hide about how the row differs from the first model."""
    found = row.forgotten
    assert found is not None
    title = f"what {visible(short(row.name))} forgot of {visible(short(first.name))}"
    console.print(Text(f"\n{title}", "bold"), soft_wrap=True)
    if found.kl_of_worst_percent is None and found.flips == 0:
        console.print("nothing differs: the models predict the same at every token")
        return
    for line in _summary(found):
        console.print(line, soft_wrap=True)
    console.print(_buckets(found))
    console.print(
        "behind: tokens of the window that were read before; seen: how often the token comes among "
        "the predicted ones",
        soft_wrap=True,
    )
    _print_hurt(console, found)
    for number, passage in enumerate(found.passages, 1):
        if not passage.kl < SHOWN_NATS:
            _print_passage(console, number, passage)


def _summary(found: Forgotten) -> list[str]:
    share = found.kl_of_worst_percent
    return [
        f"flipped: {found.lost:.2%} of the tokens were right and no longer are, {found.gained:.2%} "
        "the other way round",
        f"nats/token: {found.nll_of_worse:+.3f} by tokens that became less likely, "
        f"{found.nll_of_better:+.3f} by others; {found.clearly_worse:.2%} of all lost over 1 nat, "
        f"{found.clearly_better:.2%} gained as much",
        f"KL: half of the tokens under {found.kl_median:.4f}; the worst 1% of them hold "
        f"{0 if share is None else share:.1%} of it",
    ]


def _buckets(found: Forgotten) -> Table:
    table = new_table("", COLUMNS)
    for bucket in found.by_position:
        table.add_row(f"behind {_range(bucket)}", *_cells(bucket))
    table.add_section()
    for bucket in found.by_frequency:
        table.add_row(f"seen {_range(bucket)} x", *_cells(bucket))
    return table


def _range(bucket: Bucket) -> str:
    return f"{bucket.low}" if bucket.low == bucket.high else f"{bucket.low}-{bucket.high}"


def _cells(bucket: Bucket) -> list[str]:
    increase = f"{bucket.nll_increase:+.3f}"
    return [str(bucket.tokens), f"{bucket.kl:.4f}", f"{bucket.flips:.2%}", increase]


def _print_hurt(console: Console, found: Forgotten) -> None:
    hurt = [token for token in found.hurt if token.nll_increase >= SHOWN_NATS][:HURT_SHOWN]
    if hurt:
        listed = ", ".join(f"{quoted(t.text)} {t.nll_increase:+.2f} ({t.tokens})" for t in hurt)
        console.print(Text(f"most hurt, in nats (times seen): {listed}"))


def _print_passage(console: Console, number: int, passage: Passage) -> None:
    console.print(
        f"{number}. window {passage.window}, tokens {passage.start} to "
        f"{passage.start + passage.tokens - 1}: KL {passage.kl:.2f} a token, "
        f"{passage.flips:.0%} flipped",
        soft_wrap=True,
    )
    lines = [marked(passage), *flips(passage)]
    console.print(Padding(Group(*lines), (0, 0, 0, 3)))


def marked(passage: Passage) -> Text:
    """The passage behind its context, runs of flipped tokens between ‹ and ›."""
    line = Text(f"…{visible(passage.before)}", "dim")
    for flipped, pieces in groupby(_whole(passage.pieces), key=itemgetter(0)):
        text = "".join(piece for _, piece in pieces)
        if flipped:
            word = text.lstrip(" ") or text
            line.append(text.removesuffix(word))
            line.append(f"{OPEN}{visible(word)}{CLOSE}", "not dim bold red")
        else:
            line.append(visible(text), "not dim")
    return line


def _whole(pieces: Sequence[PassageToken]) -> Iterator[tuple[bool, str]]:
    """Flip and text of each; a flip inside a character belongs to the token that completes it."""
    waiting = False
    for piece in pieces:
        waiting |= piece.flipped
        if piece.text:
            yield waiting, piece.text
            waiting = False


def flips(passage: Passage) -> list[Text]:
    """A line for each of the worst: where, what the dense model says, and what this one says."""
    places = [n for n, piece in enumerate(passage.pieces) if piece.flipped]
    worst = sorted(places, key=lambda n: -passage.pieces[n].kl)[:FLIPS_SHOWN]
    return [_flip(passage, place) for place in worst]


def _flip(passage: Passage, place: int) -> Text:
    token = passage.pieces[place]
    before = passage.before + "".join(piece.text for piece in passage.pieces[:place])
    dense, now = (
        f"{quoted(choice.text)} {choice.probability:.0%}"
        for choice in (token.dense_choice, token.choice)
    )
    return Text(f"…{visible(before[-BEFORE_SHOWN:])}{OPEN}?{CLOSE}  dense: {dense}, now: {now}")


def quoted(text: str) -> str:
    return f'"{visible(text)}"'


def visible(text: str) -> str:
    r"""Text that is safe on a terminal: \n, \x1b and others that do not print as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
