"""Running rows of many sequences through a model, whose keys and values stay in a paged cache.

Models of Llama's parts run as one recorded plan, in which a row's result never depends on the rows
beside it. All others run through transformers, each sequence by itself.

Shape letters: B = rows, W = rows whose logits are wanted, D = hidden size, V = vocabulary,
N = pages of a sequence, S = sequences that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from prune_llm.activation.decoding import ModelLevels, PlanGates, choose_level, model_levels
from prune_llm.activation.gates import Gates
from prune_llm.activation.levels import DENSE
from prune_llm.attention import FastAttention
from prune_llm.decoder import recordable
from prune_llm.parts import ModelParts, read_parts
from prune_llm.recording import Head, Recording, rotary_angles
from prune_llm_kernels.kv_cache import LANES, KeyValueCache
from prune_llm_kernels.wide_products import WideProducts

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
        level: of activation sparsity; None: they belong to the prompt, which is always dense.
        wanted: rows at the end whose logits are wanted.
        pages: of the sequence, those of these tokens among them.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    level: str | None
    wanted: int
    pages: Sequence[int]


class Ran(NamedTuple):
    """What a run made.

    Attributes:
        logits_WV: of the wanted rows of all segments, in their order; valid until the next run.
        active: for each segment at a level that skips inputs, the share that counted, weighted by
            the weights they meet; None for the others. A plan counts such rows of a run together.
    """

    logits_WV: Tensor
    active: Sequence[float | None]


class Runner(Protocol):
    """Computes rows; whose turn it is, the batcher decides.

    Attributes:
        vocabulary: token ids are below it. context: most tokens of a sequence.
        levels: of activation sparsity.
        pages: of the cache.
        shares: whether sequences may have pages in common.
        piece: segments of a prompt begin at multiples of it and end at one or with the prompt.
    """

    name: str
    limits: BatchLimits
    vocabulary: int
    context: int
    levels: tuple[str, ...]
    pages: int
    shares: bool
    piece: int

    def run(self, segments: Sequence[Segment]) -> Ran:
        """At most max_rows + max(chunk_tokens, piece) rows, max_rows + SCORED_ROWS wanted."""

    def leave(self, slot: int) -> None:
        """The sequence of a slot ended, or begins anew."""


def new_runner(model: PreTrainedModel, limits: BatchLimits) -> Runner:
    """The runner of a model, chosen as `new_decoder` chooses.

    Raises:
        ValueError: a cache too small for one sequence of a useful length, or a model that keeps no
            keys and values.
    """
    levels = model_levels(model) if limits.levels else None
    if levels is not None:
        for name in levels.table.names:
            choose_level(model, name)
    reason = _not_planned(model)
    if reason is None:
        return PlanRunner(read_parts(model), levels, limits)
    return TransformersRunner(model, reason, levels, limits)


def _not_planned(model: PreTrainedModel) -> str | None:
    """Why the batches of a model are not run by a plan; None: they are."""
    if model.device.type != "cpu":
        return f"plans of several sequences run on the CPU, the model is on {model.device.type}"
    return recordable(model)


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the cache for one token of one sequence."""
    if _not_planned(model) is None:
        return _plan_token_bytes(read_parts(model))
    return _measured_token_bytes(model)


class PlanRunner:
    """One plan with a row for every token of a step."""

    name = "prune_llm kernels"
    shares = True
    piece = 1

    def __init__(self, parts: ModelParts, levels: ModelLevels | None, limits: BatchLimits) -> None:
        self.limits, self._embedding_VD = limits, parts.embedding_VD
        self.vocabulary = min(len(parts.embedding_VD), parts.head.out_features)
        self.levels = (DENSE,) if levels is None else tuple(levels.table.names)
        context = _context(parts.model)
        self.pages, self.context = _size(limits, _plan_token_bytes(parts), context)
        rows, longest = limits.max_rows + limits.chunk_tokens, -(-self.context // limits.page_size)
        self._table_SN = torch.zeros(limits.max_rows, min(longest, self.pages), dtype=torch.int64)
        self._tabled = [0] * limits.max_rows  # pages of each sequence that the table has
        self._pages_BN = self._table_SN.new_zeros(rows, self._table_SN.shape[1])
        self._positions_B = torch.full((rows,), -1)
        self._gates = None if levels is None else PlanGates(levels, rows)
        self._names: list[str] = []  # levels of the rows as the gates have them
        self._blocks = Recording(
            parts,
            _plan_caches(parts, self.pages, limits.page_size),
            self._pages_BN,
            self._positions_B,
            rotary_angles(parts.model, self._table_SN.shape[1] * limits.page_size),
            self._gates,
        )
        wanted = limits.max_rows + SCORED_ROWS
        self._head = Head(parts, parts.embedding_VD.new_zeros(wanted, parts.embedding_VD.shape[1]))

    @torch.inference_mode()
    def run(self, segments: Sequence[Segment]) -> Ran:
        rows = self._place(segments)
        self._choose_levels(segments)
        self._blocks.plan.run(rows)
        share = None if self._gates is None else self._gates.run_active(self._names.count(DENSE))
        active = [share if segment.level not in (None, DENSE) else None for segment in segments]
        return Ran(self._logits(segments), active)

    def leave(self, slot: int) -> None:
        self._tabled[slot] = 0

    def _place(self, segments: Sequence[Segment]) -> int:
        """Embeddings, positions and pages of the rows; how many there are."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for segment in segments:
            count = len(segment.tokens)
            tokens += segment.tokens
            positions += range(segment.start, segment.start + count)
            slots += [segment.slot] * count
            self._list_pages(segment)
        rows, used = len(tokens), max(len(segment.pages) for segment in segments)
        self._positions_B[:rows] = torch.tensor(positions)
        self._pages_BN[:rows, :used] = self._table_SN[:, :used].index_select(0, torch.tensor(slots))
        ids = torch.tensor(tokens)
        torch.index_select(self._embedding_VD, 0, ids, out=self._blocks.x_BD[:rows])
        return rows

    def _list_pages(self, segment: Segment) -> None:
        """Pages are only ever added to a sequence."""
        known, count = self._tabled[segment.slot], len(segment.pages)
        if known < count:
            self._table_SN[segment.slot, known:count] = torch.tensor(segment.pages[known:])
            self._tabled[segment.slot] = count

    def _choose_levels(self, segments: Sequence[Segment]) -> None:
        if self._gates is None:
            return
        names = [s.level or DENSE for s in segments for _ in s.tokens]
        if names != self._names:
            self._gates.choose_rows(names)
            self._names = names

    def _logits(self, segments: Sequence[Segment]) -> Tensor:
        wanted: list[int] = []
        end = 0
        for segment in segments:
            end += len(segment.tokens)
            wanted += range(end - segment.wanted, end)
        count = len(wanted)
        if count:
            x_WD = self._head.x_BD[:count]
            torch.index_select(self._blocks.x_BD, 0, torch.tensor(wanted), out=x_WD)
            self._head.plan.run(count)
        return self._head.logits_BV[:count]


class TransformersRunner:
    """Any causal LM, sequence by sequence, by its own forward pass and its own caches.

    Prompts run in pieces of one fixed size and drawn tokens one by one, so that nothing depends on
    other sequences. Pages are counted, not used.
    """

    shares = False
    piece = SCORED_ROWS

    def __init__(
        self, model: PreTrainedModel, reason: str, levels: ModelLevels | None, limits: BatchLimits
    ) -> None:
        self.name, self.limits = f"transformers ({reason})", limits
        self._model, self._caches = model, dict[int, Any]()
        self._gates: dict[str, Gates] = {}
        if levels is not None:
            names = [level.name for level in levels.table.levels]
            self._gates = {name: levels.gates(model, name) for name in names}
        self.levels = (DENSE, *self._gates)
        heads, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        sizes = [len(m.weight) for m in (heads, embedding) if m is not None]
        self.vocabulary = min(sizes)
        bytes_per_token = _measured_token_bytes(model)
        self.pages, self.context = _size(limits, bytes_per_token, _context(model))

    def run(self, segments: Sequence[Segment]) -> Ran:
        ran = [self._run_segment(segment) for segment in segments]
        return Ran(torch.cat([logits for logits, _ in ran]), [active for _, active in ran])

    def leave(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def _run_segment(self, segment: Segment) -> tuple[Tensor, float | None]:
        if segment.level is None:
            logits_TV = self._forward(segment.slot, segment.tokens, max(1, segment.wanted))
            return logits_TV[len(logits_TV) - segment.wanted :], None
        gates, found, shares = self._gates.get(segment.level), [], []
        for token in segment.tokens:
            if gates is None:
                found.append(self._forward(segment.slot, [token], 1))
                continue
            gates.reset()
            with gates:
                found.append(self._forward(segment.slot, [token], 1))
            shares.append(1 - gates.sparsity)
        logits_TV = torch.cat(found)
        active = sum(shares) / len(shares) if shares else None
        return logits_TV[len(logits_TV) - segment.wanted :], active

    @torch.inference_mode()
    def _forward(self, slot: int, tokens: Sequence[int], keep: int) -> Tensor:
        """Logits [keep, V] behind the last tokens."""
        with FastAttention(), WideProducts():
            output = self._model(
                input_ids=torch.tensor([list(tokens)], device=self._model.device),
                past_key_values=self._caches.get(slot),
                use_cache=True,
                logits_to_keep=keep,
            )
        self._caches[slot] = output.past_key_values
        logits_TV: Tensor = output.logits[0]
        return logits_TV


def _context(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    return None if context is None else int(context)


def _size(limits: BatchLimits, bytes_per_token: int, context: int | None) -> tuple[int, int]:
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


def _plan_caches(parts: ModelParts, pages: int, page_size: int) -> list[KeyValueCache]:
    first = parts.blocks[0]
    kv_heads = first.key.out_features // first.head_size
    return [
        KeyValueCache.allocate(pages, kv_heads, page_size, first.head_size, parts.dtype)
        for _ in parts.blocks
    ]


def _plan_token_bytes(parts: ModelParts) -> int:
    return sum(cache.nbytes for cache in _plan_caches(parts, 1, LANES)) // LANES


@torch.inference_mode()
def _measured_token_bytes(model: PreTrainedModel) -> int:
    """Of what one token leaves in the model's own cache."""
    output = model(input_ids=torch.tensor([[0]], device=model.device), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    tensors = [x for x in found if isinstance(x, Tensor)]
    if not tensors or len(tensors) < len(found):
        raise ValueError(
            f"{type(model).__name__}: keeps no key-value cache; call its own generate()"
        )
    return sum(x.nbytes for x in tensors)
