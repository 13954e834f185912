"""What a run needs: memory and disk, foreseen from shapes before the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prune_llm.job import Job

# of the memory that is available: what the streams may take where the user does not say
STREAM_SHARE = 0.5


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


def available_memory() -> int:
    """Bytes that can be had without swapping, of the machine and of this process's group."""
    meminfo = Path("/proc/meminfo")
    found = [_meminfo(meminfo)] if meminfo.is_file() else [1 << 62]
    return min([*found, *_group_rest()])


def _meminfo(file: Path) -> int:
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _group_rest() -> list[int]:
    """What control groups (version 2, as in a container) leave, where they limit memory."""
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return []
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cache = int(stat.get("inactive_file", 0))
    return [int(limit.read_text()) - int(used.read_text()) + cache]
