"""What a batcher asks of whatever runs its rows: tokens of many sequences in, logits out.

Shape letters: B = rows, W = rows whose logits are wanted, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from prune_llm.sampling import Sampler
from prune_llm_kernels.kv_cache import LANES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# rows of prompts whose logits a step may want besides one of each sequence
SCORED_ROWS = 64
# a cache that holds fewer tokens (or the model's context) is of no use
_USEFUL_TOKENS = 64


@dataclass(frozen=True)
class BatchLimits:
    """What runs at once.

    Attributes:
        max_rows: sequences; each decodes one token in a step.
        chunk_tokens: rows of prompts in a step, of all sequences together.
        cache_bytes: for keys and values.
        page_size: tokens that are handed out, shared and forgotten together.
        levels: serve the levels of activation sparsity, where the checkpoint has some. Its weights
            are put into channel-major order for that, for good.
    """

    max_rows: int = 32
    chunk_tokens: int = 256
    cache_bytes: int = 2**30
    page_size: int = 32
    levels: bool = True

    def __post_init__(self) -> None:
        for name in ("max_rows", "chunk_tokens", "cache_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.page_size < LANES or self.page_size % LANES:
            raise ValueError(f"page_size {self.page_size}: must be a multiple of {LANES}")


class Segment(NamedTuple):
    """Successive tokens of one sequence, to be computed in one run.

    Attributes:
        slot: of the sequence, below max_rows.
        start: position of the first token.
        tokens: the last may be DRAWN: the one that the run before drew behind the same sequence.
        level: of activation sparsity; None: they belong to the prompt, which is always dense.
        wanted: rows at the end whose logits are wanted.
        pages: of the sequence, those of these tokens among them.
        sampler: of the sequence, where a token is to be drawn behind the last row: by the runner,
            where it draws.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    level: str | None
    wanted: int
    pages: Sequence[int]
    sampler: Sampler | None = None


class Ran(NamedTuple):
    """What a run made.

    Attributes:
        logits_WV: of the wanted rows of all segments, in their order; valid until the next run.
        shares: makes ``active``; waits for the run.
        tokens_W: of the rows behind which segments have a token drawn by their sampler, the token,
            NOTHING where no logit was a number; of others anything. Valid until the next run. None:
            none was drawn.
    """

    logits_WV: Tensor
    shares: Callable[[], Sequence[float | None]]
    tokens_W: Tensor | None = None

    @property
    def active(self) -> Sequence[float | None]:
        """For each segment at a level that skips inputs, the share that counted, weighted by the
        weights they meet; None for the others. A plan counts such rows of a run together."""
        return self.shares()


class Runner(Protocol):
    """Computes rows; whose turn it is, the batcher decides.

    Attributes:
        vocabulary: token ids are below it. context: most tokens of a sequence.
        levels: of activation sparsity.
        pages: of the cache.
        shares: whether sequences may have pages in common.
        warm_rows: numbers of sequences to run once, so that later steps find everything ready.
        ways: on a GPU, which way the products of each shape and batch take, by measurement.
        piece: segments of a prompt begin at multiples of it and end at one or with the prompt.
        draws: whether it draws the tokens of segments with a sampler. Then runs can follow each
            other before their tokens are read.
    """

    name: str
    limits: BatchLimits
    vocabulary: int
    context: int
    levels: tuple[str, ...]
    pages: int
    shares: bool
    warm_rows: tuple[int, ...]
    ways: tuple[dict[str, Any], ...]
    piece: int
    draws: bool

    def run(self, segments: Sequence[Segment]) -> Ran:
        """At most max_rows + max(chunk_tokens, piece) rows, max_rows + SCORED_ROWS wanted."""

    def leave(self, slot: int) -> None:
        """The sequence of a slot ended, or begins anew."""


def model_context(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    return None if context is None else int(context)


def cache_size(limits: BatchLimits, bytes_per_token: int, context: int | None) -> tuple[int, int]:
    """Pages that the budget pays for, and the most tokens of a sequence.

    Raises:
        ValueError: too few for a sequence of a useful length.
    """
    pages = limits.cache_bytes // (bytes_per_token * limits.page_size)
    useful = _USEFUL_TOKENS if context is None else min(_USEFUL_TOKENS, context)
    least = -(-useful // limits.page_size)
    if pages < least:
        raise ValueError(
            f"cache_bytes {limits.cache_bytes}: holds {pages} pages of {limits.page_size} tokens, "
            f"{bytes_per_token} bytes each token; must be at least "
            f"{least * limits.page_size * bytes_per_token} bytes"
        )
    return pages, pages * limits.page_size if context is None else context
