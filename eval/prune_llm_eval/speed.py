"""How fast a packed model decodes: linear by linear and token by token, beside torch's dense.

Baseline and ours take turns in one run, and so does a read of a large buffer: "limit" is the share
of the byte limit, bytes that must be read / bandwidth measured in the same round / time. What gives
wrong results is not timed. Shape letters: B = rows, O = output features, I = input features.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_llm.decoder import Decoder, PlanDecoder, new_decoder
from prune_llm.generation import decode, load_tokenizer
from prune_llm.parts import LinearPart, ModelParts, read_parts
from prune_llm.report import cpu_name
from prune_llm.sampling import SamplingParams
from prune_llm.sparse_experts import packed_weights
from prune_llm_kernels import PackedWeight, cpu, dense_linear, sparse_linear, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BANDWIDTH_BYTES = 512 * 2**20
# weights of one kind that together fit a large cache are not read from memory
CACHED_BYTES = 96 * 2**20
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SpeedConfig:
    """What is timed.

    Attributes:
        contexts: prompt lengths of the end-to-end runs.
        tokens: decoded in each.
        rounds: in which everything takes its turn; figures are medians.
        threads: numbers of threads; (): one, and as many as torch uses.
        batches: rows of x of the linear-by-linear table; (): leave it out.
    """

    contexts: tuple[int, ...] = (16, 512)
    tokens: int = 64
    rounds: int = 3
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("contexts", "threads", "batches"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name} {value}: must be at least 1")
        if not self.contexts:
            raise ValueError("contexts: give at least one prompt length")
        if self.tokens < 2:
            raise ValueError(f"tokens {self.tokens}: must be at least 2, the first is the prompt's")
        if self.rounds < 1:
            raise ValueError(f"rounds {self.rounds}: must be at least 1")

    def thread_counts(self) -> tuple[int, ...]:
        return self.threads or tuple(sorted({1, torch.get_num_threads()}))


@dataclass(frozen=True)
class LinearRow:
    """One kind of linear: seconds of a call, bytes of a weight, bytes read per second."""

    kind: str
    out_features: int
    in_features: int
    sparsity: float
    batch: int
    threads: int
    torch_seconds: float
    dense_seconds: float
    packed_seconds: float
    dense_bytes: int
    packed_bytes: int
    bandwidth: float
    cached: bool

    @property
    def limit(self) -> float:
        return self.packed_bytes / self.bandwidth / self.packed_seconds

    @property
    def speed_up(self) -> float:
        return self.torch_seconds / self.packed_seconds


@dataclass(frozen=True)
class DecodeRow:
    """End to end: tokens per second behind a prompt, and seconds until its first token."""

    context: int
    threads: int
    packed: float
    own_dense: float
    transformers: float
    packed_first: float
    transformers_first: float
    packed_bytes: int
    bandwidth: float

    @property
    def limit(self) -> float:
        return self.packed * self.packed_bytes / self.bandwidth

    @property
    def speed_up(self) -> float:
        return self.packed / self.transformers


@dataclass(frozen=True)
class Resident:
    """Memory of a process that does nothing but decode, in bytes.

    Attributes:
        imported: after importing everything.
        loaded: more than that, after loading the model and decoding.
        weights: the model's tensors; cache: keys and values.
    """

    imported: int
    loaded: int
    weights: int
    cache: int

    @property
    def other(self) -> int:
        """Beyond weights and cache; negative where some weights were never read."""
        return self.loaded - self.weights - self.cache


@dataclass
class SpeedReport:
    """Everything that was measured, and where."""

    about: dict[str, Any]
    resident: Resident
    linears: list[LinearRow] = field(default_factory=list)
    decodes: list[DecodeRow] = field(default_factory=list)

    def json_line(self) -> str:
        return json.dumps(asdict(self))


def measure(
    model: str, against: str | None, config: SpeedConfig, on_progress: OnProgress
) -> SpeedReport:
    """Time the packed checkpoint ``model``.

    Args:
        against: the dense model to compare with; None: the same model with its zeros stored.

    Raises:
        ValueError: nothing packed in it, a baseline of another shape, a model that has no plan.
        RuntimeError: a result is wrong; nothing is timed then.
    """
    from transformers.utils import logging

    from prune_llm.integration import load

    logging.disable_progress_bar()
    on_progress("loading", 0, 1)
    sparse = load(model).eval()
    packed = _packed(sparse, model)
    parts = _parts(sparse)
    longest = max(config.contexts) + config.tokens
    check_context(sparse, longest)
    resident = measure_resident(model, max(config.contexts), config.tokens)
    dense = load(against or model, dequantize=against is None, dtype=parts.dtype).eval()
    check_linears(packed)
    report = SpeedReport(_about(model, against, parts), resident)
    buffer = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.int64)
    before = torch.get_num_threads()
    threads = config.thread_counts()
    kinds = _kinds(packed, dense)
    total = len(threads) * (len(kinds) * len(config.batches) + len(config.contexts))
    done = 0
    try:
        for count in threads:
            torch.set_num_threads(count)
            for batch in config.batches:
                for kind, pairs in kinds.items():
                    on_progress(f"{kind}, {count} threads", done, total)
                    report.linears.append(time_linear(kind, pairs, batch, config.rounds, buffer))
                    done += 1
            for context in config.contexts:
                on_progress(f"context {context}, {count} threads", done, total)
                report.decodes.append(time_decoding(sparse, dense, context, config, buffer))
                done += 1
    finally:
        torch.set_num_threads(before)
    return report


def _packed(model: PreTrainedModel, name: str) -> dict[str, PackedWeight]:
    found = packed_weights(model)
    if not found:
        raise ValueError(
            f"{name}: holds no packed weights; prune it, or write it with "
            "prune-llm export --format sparse"
        )
    return found


def _parts(model: PreTrainedModel) -> ModelParts:
    decoder = new_decoder(model, 16)
    if not isinstance(decoder, PlanDecoder):
        raise ValueError(f"{type(model).__name__}: decodes through {decoder.name}; no plan to time")
    return read_parts(model)


def check_context(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError for a prompt and its answer that do not fit."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"contexts and tokens: {longest} together, the model's context is {context}; ask for "
            "less"
        )


def _about(model: str, against: str | None, parts: ModelParts) -> dict[str, Any]:
    return {
        "model": Path(model).name,
        "against": None if against is None else Path(against).name,
        "cpu": cpu_name(),
        "isa": cpu.isa_names()[cpu.isa_index()],
        "thread_pool": cpu.thread_pool_name(),
        "torch": torch.__version__,
        "dtype": str(parts.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
    }


# -- linear by linear ------------------------------------------------------------------------

Pair = tuple[PackedWeight, Tensor]


def _kinds(packed: dict[str, PackedWeight], dense: PreTrainedModel) -> dict[str, list[Pair]]:
    """Weights of every kind over all blocks: read in turn, none stays in a cache for long."""
    kinds: dict[str, list[Pair]] = {}
    for path, weight in packed.items():
        linear = dense.get_submodule(path)
        shape = (weight.out_features, weight.in_features)
        if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != shape:
            raise ValueError(f"{path}: the dense model has no linear {list(shape)} of that name")
        kinds.setdefault(path.rpartition(".")[2], []).append((weight, linear.weight.detach()))
    return kinds


def check_linears(packed: dict[str, PackedWeight]) -> None:
    """Every packed weight against float64; error at most twice that of torch's dense op."""
    for path, weight in packed.items():
        dense_OI = unpack(weight)
        x = torch.randn(1, weight.in_features).to(weight.dtype)
        exact = x.double() @ dense_OI.double().T
        allowed = 2 * (F.linear(x, dense_OI) - exact).abs().max()
        allowed += torch.finfo(x.dtype).eps * exact.abs().max()
        error = (sparse_linear(x, weight) - exact).abs().max()
        if not error <= allowed:
            raise RuntimeError(
                f"{path}: wrong by {float(error):.3g}, allowed {float(allowed):.3g}; not timed"
            )


def time_linear(
    kind: str, pairs: Sequence[Pair], batch: int, rounds: int, buffer: Tensor
) -> LinearRow:
    """Medians over every weight of the kind, read one after the other, round after round."""
    first, dense_OI = pairs[0]
    x = torch.randn(batch, first.in_features).to(first.dtype)
    # one op over every weight, then the next op: what one has read the other finds no more
    ops: dict[str, list[Callable[[], object]]] = {
        "packed": [partial(sparse_linear, x, weight) for weight, _ in pairs],
        "torch": [partial(F.linear, x, weight_OI) for _, weight_OI in pairs],
        "dense": [partial(dense_linear, x, weight_OI) for _, weight_OI in pairs],
        "read": [partial(cpu.read_all, buffer)],
    }
    times: dict[str, list[float]] = {name: [] for name in ops}
    for round_ in range(rounds + 1):
        for name, calls in ops.items():
            seconds = [seconds_of(call) for call in calls]
            times[name] += seconds if round_ else []  # the first round warms up
    median = {name: statistics.median(values) for name, values in times.items()}
    return LinearRow(
        kind,
        first.out_features,
        first.in_features,
        1 - first.packed.numel() / dense_OI.numel(),
        batch,
        torch.get_num_threads(),
        median["torch"],
        median["dense"],
        median["packed"],
        dense_OI.nbytes,
        first.nbytes,
        buffer.nbytes / median["read"],
        sum(weight.nbytes for weight, _ in pairs) < CACHED_BYTES,
    )


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# -- token by token --------------------------------------------------------------------------


def time_decoding(
    sparse: PreTrainedModel,
    dense: PreTrainedModel,
    context: int,
    config: SpeedConfig,
    buffer: Tensor,
) -> DecodeRow:
    """Greedy decoding behind a prompt of random tokens; the three take turns."""
    vocabulary = sparse.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(vocabulary, (context,), generator=generator).tolist()
    tokenizer = load_tokenizer(sparse)
    capacity = context + config.tokens
    parts = read_parts(sparse)
    packed, own_dense = PlanDecoder(parts, capacity), PlanDecoder(read_parts(dense), capacity)
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "packed": lambda: time_plan(packed, ids, config.tokens, tokenizer),
        "own_dense": lambda: time_plan(own_dense, ids, config.tokens, tokenizer),
        "transformers": lambda: time_transformers(dense, [ids], config.tokens),
        "read": lambda: (seconds_of(lambda: cpu.read_all(buffer)), 0.0),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_ in range(config.rounds + 1):
        for name, run in runs.items():
            timed = run()
            found[name] += [timed] if round_ else []  # the first round warms up
    first = {name: statistics.median(value for value, _ in found[name]) for name in runs}
    speed = {name: statistics.median(value for _, value in found[name]) for name in runs}
    return DecodeRow(
        context,
        torch.get_num_threads(),
        speed["packed"],
        speed["own_dense"],
        speed["transformers"],
        first["packed"],
        first["transformers"],
        step_bytes(parts, context + config.tokens // 2),
        buffer.nbytes / first["read"],
    )


def time_plan(decoder: Decoder, ids: list[int], tokens: int, tokenizer: Any) -> tuple[float, float]:
    """Seconds to the first token and tokens per second, drawing and decoding text included."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for piece in decode(decoder, ids, params, tokenizer, frozenset()):
        generation = piece.generation
    return generation.prefill_seconds, generation.tokens_per_second


def time_transformers(
    model: PreTrainedModel, prompts: list[list[int]], tokens: int
) -> tuple[float, float]:
    """The same for transformers' own `generate`; tokens per second of each of the prompts."""
    clock = _Clock()
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            torch.tensor(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
    first, last = clock.times[1], clock.times[-1]
    return first - started, (tokens - 1) / (last - first)


class _Clock:
    """A streamer that notes when something arrives: the prompt, then every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def step_bytes(parts: ModelParts, context: int, rows: int = 1, active: float = 1.0) -> int:
    """Bytes that a step of some rows must read: weights once, each row's own keys and values.

    Args:
        context: tokens before, of each row.
        active: share of the blocks' weights whose inputs count.
    """
    linears: list[LinearPart] = []
    for block in parts.blocks:
        linears += [block.query, block.key, block.value, block.output]
        linears += [block.gate, block.up, block.down]
    weights = round(active * sum(linear.weight.nbytes for linear in linears))
    cached = sum(block.key.out_features + block.value.out_features for block in parts.blocks)
    cached *= rows * context * parts.embedding_VD.element_size()
    return weights + parts.head.weight.nbytes + cached


# -- memory ----------------------------------------------------------------------------------


def measure_resident(model: str, context: int, tokens: int) -> Resident:
    """What a fresh process holds while it decodes."""
    command = [sys.executable, "-m", "prune_llm_eval.speed", model, str(context), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring memory failed: {result.stderr.strip()[-500:]}")
    return Resident(**json.loads(result.stdout.splitlines()[-1]))


def _decode_alone(model: str, context: int, tokens: int) -> Resident:
    from prune_llm.integration import load

    load_nothing = resident_bytes()
    loaded = load(model).eval()
    parts = read_parts(loaded)
    decoder = PlanDecoder(parts, context + tokens)
    decoder.prefill([1] * context)
    for _ in range(tokens - 1):
        decoder.step(1)
    weights = sum(p.nbytes for p in {id(p): p for p in loaded.parameters()}.values())
    return Resident(load_nothing, resident_bytes() - load_nothing, weights, decoder.cache_bytes)


def resident_bytes() -> int:
    """Physical memory of this process, from the system (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    import transformers.modeling_utils  # noqa: F401  # counted as imported

    print(json.dumps(asdict(_decode_alone(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
