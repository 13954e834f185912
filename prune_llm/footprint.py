"""What a run needs, foreseen from shapes before the work begins: memory, GPU memory, disk.

At the peak of a block's pruning the process holds

    what it holds already (interpreter, libraries, the text) + the streams, where they are in memory
    + the block's weights, twice beside the dense model's stream + the head, for the goal "logits"
    + the largest of: embedding, running a batch, solving a site, training, packing

with the weights in the dtype that blocks run in, statistics and solvers in float32. On a GPU the
streams, the block read ahead, and the pruned weights until they are on disk, stay on the CPU; the
rest is on the GPU.
What solving takes beside the Gram matrices is told by `solver_copies`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from prune_llm import architecture as arch
from prune_llm.block import STATISTICS_BYTES
from prune_llm.masks import Pattern
from prune_llm.memory import available_memory
from prune_llm.methods import METHODS, SolvesTogether
from prune_llm.report import resident_memory
from prune_llm.residence import expert_weights
from prune_llm.solver_copies import (
    AIMED,
    FACTORING,
    GROUPS,
    NOTHING,
    REFINED,
    TOGETHER_BYTES,
    UNSTRUCTURED,
    together_bytes,
)  # fmt: skip
from prune_llm.statistics import Needs
from prune_llm.windows import needs, surveys
from prune_llm_kernels.wide_products import SLICE_BYTES, slow_dtypes

if TYPE_CHECKING:
    from prune_llm.job import Job

# of the memory that is available: what the streams may take where the user does not say
STREAM_SHARE = 0.5
# and of what they leave: what the experts of a block may take
EXPERT_SHARE = 0.5
# a run is refused where this share of what it needs is not there: the foreseen is not exact
SURE = 0.8
# libraries that are loaded when they are first needed
LATER = 50 << 20


# of a dense weight's bytes: what packing one holds at once beside the packed parts
PACKING = 4.0
# training: float32 weights, gradients, two moments, the copy that is put back; masks and results
TRAINED_BYTES = 26


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak.

    Attributes:
        memory: resident in all; held: of it, what the process holds already.
        gpu: None on a CPU.
        disk: beside the output until it is complete, the output included.
        streams: of all streams of hidden states; on_disk: whether they are kept there.
        experts: of a block, where they lie on disk and one at a time is in memory; else 0.
    """

    memory: int
    held: int
    gpu: int | None
    disk: int
    streams: int
    on_disk: bool
    experts: int = 0

    @property
    def text(self) -> str:
        gpu = "" if self.gpu is None else f", {_told(self.gpu)} GPU memory"
        where = "on disk" if self.on_disk else "in memory"
        return (
            f"needs about {_told(self.memory)} memory{gpu}, {_told(self.disk)} disk; "
            f"activations {where}: {_told(self.streams)}"
            + (f"; experts on disk, one at a time: {_told(self.experts)}" if self.experts else "")
        )


def _told(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def footprint(job: Job, whole: bool = False) -> Footprint:
    """Of a run.

    Args:
        whole: the pruned model is loaded whole afterwards.
    """
    shapes = _Shapes(job, experts_on_disk(job))
    streams, on_disk = stream_count(job) * stream_bytes(job), streams_on_disk(job)
    held = resident_memory()
    working = max(shapes.embedding, shapes.resident + max(shapes.running, shapes.solving))
    if job.config.reconstruction != "none":
        working = max(working, shapes.resident + shapes.training)
    host = 0 if on_disk else streams
    if job.device.type == "cpu":
        memory, gpu = host + max(working, shapes.resident + shapes.packing), None
    else:
        memory, gpu = host + shapes.waiting + shapes.pruned + shapes.packing, working
    if whole:
        memory = max(memory, shapes.model)
    output = job.checkpoint.nbytes - shapes.stored + shapes.packed
    generations = 2 * streams if streams else 0
    # experts as they were and as they are pruned, until the block is written
    disk = shapes.packed + max(output, generations + 2 * shapes.experts)
    return Footprint(held + LATER + memory, held, gpu, disk, streams, on_disk, shapes.experts)


def check_fits(found: Footprint, directory: Path, used: int = 0) -> None:
    """Refuse what cannot fit.

    Args:
        used: of the disk, by what a stopped run has left.

    Raises:
        ValueError: names what is missing, and what to change.
    """
    more, there = found.memory - found.held, available_memory()
    if SURE * more > there:
        how = "fewer --samples" if found.on_disk else "--activations disk or fewer --samples"
        raise ValueError(
            f"memory: this run needs about {_told(more)} more and {_told(there)} are "
            f"available; give {how}, or --method wanda, which takes least"
        )
    free = shutil.disk_usage(directory).free + used
    if SURE * found.disk > free:
        raise ValueError(
            f"output {str(directory)!r}: this run needs about {_told(found.disk)} of disk "
            f"and {_told(free)} are free; give an output on another disk, or fewer --samples"
        )


class _Shapes:
    """Bytes by what they are for."""

    def __init__(self, job: Job, mapped: bool = False) -> None:
        self.job, self.item = job, job.dtype.itemsize
        architecture = job.architecture
        self.blocks = [
            arch.select(architecture.linears(index), job.config.ignore)
            for index in range(len(architecture.blocks))
        ]
        self.largest = max(
            range(len(self.blocks)), key=lambda index: _values(architecture.blocks[index])
        )
        self.block = _values(architecture.blocks[self.largest]) * self.item
        self.linears = self.blocks[self.largest]
        self.experts = expert_bytes(job, self.largest) if mapped else 0
        self.dense = job.calibration is not None and stream_count(job) > 1
        self.staged = job.calibration is not None and job.config.target == "dense"

    @property
    def model(self) -> int:
        return _values(self.job.architecture.model) * self.item

    @property
    def outside(self) -> int:
        state = self.job.architecture.model.state_dict()
        values = (int(state[n].numel()) for n in self.job.architecture.outside_names())
        return sum(values) * self.item

    @property
    def embedding(self) -> int:
        """The embeddings and the first block; nothing where no text is read."""
        if self.job.calibration is None:
            return 0
        mapped = expert_bytes(self.job, 0) if self.experts else 0
        return self.outside + _values(self.job.architecture.blocks[0]) * self.item - mapped

    @property
    def resident(self) -> int:
        """While a block is pruned."""
        twice = (self.dense and self.job.config.reconstruction != "logits") or self.staged
        return (self.block - self.experts) * (1 + twice) + self.head + self._stored_apart

    @property
    def _stored_apart(self) -> int:
        """Pruned weights that wait for training, stored in another dtype than they run in."""
        if self.job.config.reconstruction == "none":
            return 0
        stored = _stored_bytes(self.job, self.linears)
        same = sum(linear.weight.numel() for linear in self.linears) * self.item == stored
        return 0 if same else stored

    @property
    def head(self) -> int:
        """What lies outside the blocks, where it stays for the goal "logits"."""
        if self.job.config.reconstruction != "logits":
            return 0
        return self.model - sum(map(_values, self.job.architecture.blocks)) * self.item

    @property
    def running(self) -> int:
        """A batch through the block."""
        if self.job.calibration is None:
            return 0
        samples, seq_len = self.job.calibration.samples_ST.shape
        tokens = min(self.job.batch_size, samples) * seq_len
        width = max((max(linear.weight.shape) for linear in self.linears), default=0)
        return tokens * width * (3 * self.item + 4) + self._widened(tokens * width)

    def _widened(self, values: int) -> int:
        """Where products run in float32: the result, and a slice of a weight.

        Args:
            values: of a batch at the widest place.
        """
        if self.job.device.type != "cpu" or self.job.dtype not in slow_dtypes():
            return 0
        largest = max((linear.weight.numel() for linear in self.linears), default=0)
        return 4 * values + min(SLICE_BYTES, 4 * largest)

    @property
    def solving(self) -> int:
        """Statistics of all sites that are measured together, and one of them being solved."""
        wanted, config = needs(self.job.config), self.job.config
        collects = Needs.GRAM in wanted and self.job.calibration is not None
        sites, surveyed = list(self._sites()), surveys(config) and config.allocation == "error"
        widths = [width for width, _ in sites]
        solving = 0
        for number, (width, sizes) in enumerate(sites):
            # a site's statistics are freed with it, but where all are measured anew in stages
            left = widths if self.staged else widths[number:]
            grams = _measured(left, self.staged) if collects else 0
            if collects and surveyed:
                grams = max(grams, 4 * sum(w * w for w in widths))
            copies = (UNSTRUCTURED, GROUPS)[Pattern.parse(config.pattern).m is not None]
            factoring = FACTORING.get(config.method, NOTHING)
            used = [copies[config.method], factoring, REFINED[config.refine]]
            site, one, gram = 4 * sum(sizes), 4 * max(sizes), 4 * width * width
            taken = max(c.grams * gram + c.site * site + c.linear * one for c in used)
            if self.staged:
                aimed = AIMED.grams * gram + AIMED.site * site + AIMED.linear * one
                taken = max(taken + site, aimed)
            solving = max(solving, grams + int(site + taken), grams + self._together(sites[number]))
        return solving

    def _together(self, site: tuple[int, list[int]]) -> int:
        """Where sites like this one are solved at once."""
        method = METHODS[self.job.config.method]
        if not (self.job.solves_together and isinstance(method, SolvesTogether)):
            return 0
        sites = list(self._sites())
        together = sum(together_bytes(width, sum(sizes)) for width, sizes in sites)
        return min(TOGETHER_BYTES, together) if sites.count(site) > 1 else 0

    def _sites(self) -> Iterator[tuple[int, list[int]]]:
        """Width and sizes of the linears of each site: those of one module that read as much, but
        for its last one, which reads what the others make."""
        by_owner: dict[str, list[arch.Linear]] = {}
        for linear in self.linears:
            by_owner.setdefault(linear.kind.rpartition(".")[0], []).append(linear)
        for linears in by_owner.values():
            last = linears[-1:] if len(linears) > 1 else []
            groups: dict[int, list[int]] = {}
            for linear in linears[: len(linears) - len(last)]:
                width = int(linear.to_OI(linear.weight).shape[1])
                groups.setdefault(width, []).append(linear.weight.numel())
            yield from groups.items()
            for linear in last:
                yield int(linear.to_OI(linear.weight).shape[1]), [linear.weight.numel()]

    @property
    def training(self) -> int:
        weights = sum(linear.weight.numel() for linear in self.linears)
        samples = self.job.calibration
        tokens = 0 if samples is None else samples.samples_ST.shape[1]
        width = sum(sum(linear.weight.shape) for linear in self.linears)
        return (
            weights * TRAINED_BYTES
            + 4 * _values(self.job.architecture.blocks[self.largest])
            + 8 * tokens * width
        )

    @property
    def waiting(self) -> int:
        """The next block in pinned memory, which torch hands out in powers of two."""
        return 2 * self.block if len(self.blocks) > 1 else 0

    @property
    def pruned(self) -> int:
        """The block's pruned weights as stored."""
        return _stored_bytes(self.job, self.linears)

    @property
    def packing(self) -> int:
        """Of one weight, beside the dense one; packed ones are written as they come."""
        if self.job.config.format != "sparse" or not self.linears:
            return 0
        largest = max(_stored_bytes(self.job, [linear]) for linear in self.linears)
        return int(PACKING * largest)

    @property
    def stored(self) -> int:
        """All pruned weights, dense."""
        return sum(_stored_bytes(self.job, linears) for linears in self.blocks)

    @property
    def packed(self) -> int:
        """All pruned weights as they will lie on disk."""
        if self.job.config.format != "sparse":
            return self.stored
        return sum(_packed_bytes(self.job, linears) for linears in self.blocks)


def _measured(widths: list[int], staged: bool) -> int:
    """Gram matrices of the sites that are measured in one pass (see `Block.statistics`).

    In stages these are the sites of all experts that are alike, and others one by one.
    """
    each = 8 if staged else 4
    together = sum(width * width for width in widths)
    if staged:
        counts = Counter(widths).items()
        together = max((count * width * width for width, count in counts), default=0)
    largest = max(widths, default=0) ** 2
    return each * max(largest, min(together, STATISTICS_BYTES // each))


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stored_bytes(job: Job, linears: list[arch.Linear]) -> int:
    names = (job.architecture.disk_names[linear.weight_name] for linear in linears)
    return sum(job.checkpoint.tensor(name).nbytes for name in names)


def _packed_bytes(job: Job, linears: list[arch.Linear]) -> int:
    """Values that are kept, and a bit for each that there was."""
    density = 1 - Pattern.parse(job.config.pattern).sparsity
    weights = sum(linear.weight.numel() for linear in linears)
    stored = _stored_bytes(job, linears)
    return int(min(stored, density * stored + weights / 8))


def expert_bytes(job: Job, index: int) -> int:
    """Of a block's routed experts, in the dtype they run in."""
    names = expert_weights(job.architecture, index)
    values = sum(int(job.architecture.model.get_parameter(name).numel()) for name in names)
    return values * job.dtype.itemsize


def experts_on_disk(job: Job) -> bool:
    """Whether the experts of a block go to disk: as asked, or where they take too much memory.

    Raises:
        ValueError: it is asked for on a GPU.
    """
    asked, plain = job.config.experts, job.config.reconstruction == "none"
    if asked == "disk" and job.device.type != "cpu":
        raise ValueError(
            f"experts 'disk': on {job.device.type} the experts of a block are on the device; give "
            "--device cpu, or leave --experts out"
        )
    if asked != "auto" or job.device.type != "cpu" or not plain:
        return asked == "disk"
    most = max(expert_bytes(job, index) for index in range(len(job.architecture.blocks)))
    twice = 1 + (job.config.target == "dense")
    held = 0 if streams_on_disk(job) else stream_count(job) * stream_bytes(job)
    return most * twice > EXPERT_SHARE * (available_memory() - held)


def stream_bytes(job: Job) -> int:
    """Of one stream of hidden states over all samples; 0 without calibration data."""
    if job.calibration is None:
        return 0
    samples, seq_len = job.ranks.share(job.calibration.samples_ST).shape
    return samples * seq_len * job.width * job.dtype.itemsize


def stream_count(job: Job) -> int:
    """Streams that are kept at once: the pruned model's, the dense model's, and its last one."""
    dense = job.config.target == "dense" or job.config.reconstruction == "block"
    return 1 + dense + (job.config.reconstruction == "logits")


def streams_on_disk(job: Job) -> bool:
    """Whether the streams go to disk: as asked, or where they would take too much memory."""
    if job.config.activations != "auto" or job.calibration is None:
        return job.config.activations == "disk" and job.calibration is not None
    return stream_count(job) * stream_bytes(job) > STREAM_SHARE * available_memory()
