"""Experts of a block beyond memory: mapped from a file that has no name, the same bytes, less
memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from kill_points import content
from tiny_models import save_model

from prune_llm import PruneConfig, prune
from prune_llm.footprint import EXPERT_SHARE, expert_bytes, experts_on_disk, footprint
from prune_llm.job import Job
from prune_llm.scratch import ALIGNMENT, Scratch

# runs that tell the highest anonymous memory of their process, in bytes, above that at their start
MEASURED = """
import json, sys, threading
from pathlib import Path
from prune_llm import PruneConfig, prune

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    while not ended.wait(0.001):
        peak[0] = max(peak[0], anonymous())

for model, out, options in json.loads(sys.argv[1]):
    before, peak, ended = anonymous(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    prune(model, PruneConfig(**options), out)
    ended.set()
    thread.join()
    print(json.dumps(peak[0] - before))
"""
EXPERTS = 64
WIDE = {"hidden_size": 256, "num_hidden_layers": 1, "head_dim": 32, "vocab_size": 264}


def large(name: str) -> Any:
    """Experts of one block that take 100 MB in float32, of both kinds."""
    import transformers as tf

    if name == "fused":
        settings = {**FAMILIES["gpt_oss"].settings, **WIDE, "intermediate_size": 512}
        return tf.GptOssConfig(
            **{**settings, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
        )
    settings = {**FAMILIES["qwen3_moe"].settings, **WIDE, "moe_intermediate_size": 512}
    return tf.Qwen3MoeConfig(**{**settings, "num_experts": EXPERTS, "num_experts_per_tok": 2})


def test_memory_is_that_of_few_experts(corpus: Path, tmp_path: Path) -> None:
    names, wheres = ("apart", "fused"), ("disk", "memory")
    tiny = FAMILIES["qwen3_moe"].save(tmp_path / "tiny")  # what is loaded when it is first needed
    models = {name: save_model(tmp_path / name, large(name), torch.float32) for name in names}
    options = {"method": "wanda", "calibration": str(corpus), "samples": 4, "seq_len": 32}
    runs = [(str(tiny), str(tmp_path / "out"), options)]
    for where in wheres:
        asked = {**options, "experts": where, "device": "cpu"}
        runs += [(str(models[n]), str(tmp_path / where / n / "out"), asked) for n in names]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(runs)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    experts = EXPERTS * 3 * 256 * 512 * 4
    peaks = [int(line) for line in done.stdout.splitlines()][1:]
    for name, disk, memory in zip(names, peaks[:2], peaks[2:], strict=True):
        print(f"{name}: {disk / 1e6:.1f} MB, in memory {memory / 1e6:.1f} MB")
        assert memory > 0.9 * experts
        assert disk < 0.5 * experts
        found = [content(tmp_path / where / name) for where in wheres]
        assert found[0].pop("out/prune_report.json") != found[1].pop("out/prune_report.json")
        assert found[0] == found[1] and len(found[0]) > 2


SOLVED: dict[str, Any] = {"method": "sparsegpt", "format": "dense"}
AIMED = {"target": "dense", "refine": "backsolve", "allocation": "error"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt_oss", SOLVED),
        ("gpt_oss", AIMED),
        ("llama4", {"method": "sparsegpt", "dtype": "bfloat16"}),
        ("granitemoe", AIMED),
        ("qwen3_moe", SOLVED),
    ],
)
def test_the_same_bytes(
    name: str,
    changes: dict[str, Any],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the statistics of all experts together do not fit."""
    monkeypatch.setattr("prune_llm.block.STATISTICS_BYTES", 3 * 2 * 4 * 48 * 48)
    model = FAMILIES[name].save(tmp_path / "model")
    options = {"method": "wanda", "calibration": str(corpus), "samples": 4, "seq_len": 24}
    found = {}
    for where in ("memory", "disk"):
        notes: list[str] = []
        config = PruneConfig(**{**options, **changes, "experts": where})
        prune(model, config, tmp_path / where / "out", on_note=notes.append)
        assert ("experts on disk, one at a time" in notes[0]) == (where == "disk")
        found[where] = content(tmp_path / where / "out")
        assert [path.name for path in (tmp_path / where).iterdir()] == ["out"]
    memory, disk = found.values()
    assert memory.pop("prune_report.json") != disk.pop("prune_report.json")
    assert memory == disk


@pytest.fixture
def job(tmp_path: Path) -> Job:
    config = PruneConfig(method="magnitude", device="cpu")
    model = FAMILIES["qwen3_moe"].save(tmp_path / "model")
    return Job.open(model, config, torch.device("cpu"), None, None)


def asking(job: Job, **changes: Any) -> Job:
    from dataclasses import replace

    return replace(job, config=replace(job.config, **changes))


def test_they_go_to_disk_where_they_take_too_much(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = FAMILIES["qwen3_moe"].settings
    experts = settings["num_experts"] * 3 * settings["hidden_size"]
    experts *= 4 * settings["moe_intermediate_size"]
    assert expert_bytes(job, 0) == experts
    for more, on_disk in ((1, False), (-1, True)):
        there = int(experts / EXPERT_SHARE) + more
        monkeypatch.setattr("prune_llm.footprint.available_memory", lambda there=there: there)
        assert experts_on_disk(job) == on_disk
        assert not experts_on_disk(asking(job, reconstruction="block"))
    monkeypatch.undo()
    memory, disk = footprint(asking(job, experts="memory")), footprint(asking(job, experts="disk"))
    assert memory.experts == 0 and disk.experts == experts
    assert disk.memory - disk.held == memory.memory - memory.held - experts
    assert disk.disk >= 2 * experts


def test_what_cannot_be_is_refused(job: Job) -> None:
    with pytest.raises(ValueError, match="experts 'disk': reconstruction 'block' trains all"):
        PruneConfig(experts="disk", reconstruction="block")
    with pytest.raises(ValueError, match="experts 'ram': unknown"):
        PruneConfig(experts="ram")
    job.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"experts 'disk': on cuda .* --device cpu"):
        experts_on_disk(asking(job, experts="disk"))


def test_scratch(tmp_path: Path) -> None:
    """Tensors of odd sizes, aligned; nothing is to be seen of the file."""
    weights = [torch.randn(3, 7), torch.randn(5, 3).to(torch.bfloat16), torch.randn(2, 33).T]
    scratch = Scratch(tmp_path, 4096)
    found = [scratch.put(weight) for weight in weights]
    assert list(tmp_path.iterdir()) == []
    del scratch  # what was put stays as long as it is held
    for weight, mapped in zip(weights, found, strict=True):
        assert torch.equal(mapped, weight) and mapped.dtype == weight.dtype
        assert mapped.data_ptr() % ALIGNMENT == 0
    with pytest.raises(AssertionError, match="foreseen"):
        Scratch(tmp_path, 64).put(torch.zeros(17))
