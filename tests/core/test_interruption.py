"""Runs that are stopped anywhere go on to the same bytes; what cannot go on says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kill_points import content
from tiny_models import llama_config, save_model

from prune_llm import Progress, PruneConfig, SparsifyConfig, prune, prune_within
from prune_llm.journal import JOURNAL_FILE, Journal, read_journal
from prune_llm.staging import Staging

# a target that every sparsity meets: two are tried, the first and the last
MOST = 1e6
ALL = ["SIGKILL", "SIGINT", "full"]
# config, and how many durable steps lie between two runs that are stopped
VARIANTS: dict[str, dict[str, Any]] = {
    "wanda": {"stride": 9, "config": {"method": "wanda"}},
    "no data, N:M": {"stride": 15, "config": {"method": "magnitude", "pattern": "2:4"}},
    "best, on disk": {
        "stride": 30,
        "config": {
            "method": "wanda", "target": "dense", "refine": "backsolve", "allocation": "error",
            "reconstruction": "logits", "reconstruction_steps": 6, "activations": "disk",
        },
    },
    "dense form": {
        "stride": 22,
        "config": {
            "method": "sparsegpt", "format": "dense", "reconstruction": "block",
            "reconstruction_steps": 6,
        },
    },
    "experts": {"stride": 11, "model": "experts", "config": {"method": "wanda"}},
    "experts on disk": {
        "stride": 11, "model": "experts", "beside": True,
        "config": {"method": "wanda", "experts": "disk"},
    },
    "packed beside": {"stride": 12, "beside": True, "config": {"method": "wanda"}},
    "levels": {
        "stride": 19, "config": {"method": "wanda"}, "levels": {"activation_sparsity": [0.3]}
    },
    "search": {"stride": 30, "config": {"method": "wanda"}, "within": MOST},
}  # fmt: skip


def experts_config() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": save_model(folder / "llama", llama_config(**sizes)),
        "experts": save_model(folder / "experts", experts_config()),
    }


def settings(corpus: Path) -> dict[str, Any]:
    return {
        "calibration": str(corpus), "samples": 6, "seq_len": 32, "batch_size": 2, "device": "cpu"
    }  # fmt: skip


@pytest.fixture(scope="module")
def answers(
    models: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All variants, each stopped at some of its durable steps."""
    place = tmp_path_factory.mktemp("killed")
    lines = [
        json.dumps({
            "stop": ALL, "first": variant["stride"] // 2, **variant,
            "place": str(place / name.replace(" ", "-")),
            "model": str(models[variant.get("model", "llama")]),
            "config": {**settings(corpus), **variant["config"]},
        })
        for name, variant in VARIANTS.items()
    ]  # fmt: skip
    script = Path(__file__).parents[1] / "kill_points.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        # a fork has the threads of its parent's kernels in name only
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(VARIANTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_at_any_step_it_ends_with_the_same_bytes(
    name: str, answers: dict[str, Any]
) -> None:
    answer = answers[name]
    assert len(answer["runs"]) >= 3
    assert {run["stop"] for run in answer["runs"]} == set(ALL)
    for run in answer["runs"]:
        told = f"{run['stop']} at step {run['step']}: {run['said']} {run['why']}"
        assert run["content"] == answer["whole"], told
        assert run["status"] != 0 or run["left"] == ["out"], told
        if "out" in run["left"]:  # it has its name: complete, whatever else is left
            assert run["resumed"] == 0
        else:
            assert run["rest"] == ["out"], told
        if run["stop"] == "full" and run["status"] != 0:
            assert "the disk is full; make room" in run["said"]


def test_blocks_were_kept(answers: dict[str, Any]) -> None:
    assert all(any(run["journal"] for run in answer["runs"]) for answer in answers.values())
    assert sum(run["journal"] for answer in answers.values() for run in answer["runs"]) >= 12


class Stop:
    """Interrupts a run when a block has been pruned.

    Args:
        block: its index; -1: the run goes to its end.
        behind: the output, and how many records must be on disk by then: a thread writes them.
    """

    def __init__(self, block: int, behind: tuple[Path, int] | None = None) -> None:
        self.block, self.seen, self.behind = block, list[tuple[int, str]](), behind

    def __call__(self, progress: Progress) -> None:
        self.seen.append((progress.block, progress.phase))
        if (progress.block, progress.phase) == (self.block, "pruned"):
            if self.behind is not None:
                self.wait(*self.behind)
            raise KeyboardInterrupt

    @staticmethod
    def wait(output: Path, records: int) -> None:
        journal = output.with_name(f".{output.name}.partial") / JOURNAL_FILE
        until = time.monotonic() + 60
        while (found := len(read_journal(journal)[0])) < records:
            assert time.monotonic() < until, f"{found} of {records} records after a minute"
            time.sleep(0.001)


Start = Callable[..., PruneConfig]


@pytest.fixture
def stopped(models: dict[str, Path], corpus: Path, tmp_path: Path) -> Start:
    """Prune to tmp_path/out, and stop behind the given block."""

    def start(block: int = 2, **changes: Any) -> PruneConfig:
        config = PruneConfig(**{**settings(corpus), "method": "wanda", **changes})
        with pytest.raises(KeyboardInterrupt):
            stop = Stop(block, (tmp_path / "out", 1 + block))  # the settings, then each block
            prune(models["llama"], config, tmp_path / "out", stop)
        return config

    return start


def again(model: Path, config: PruneConfig, output: Path, **how: Any) -> list[tuple[int, str]]:
    """What is done by the run that goes on."""
    seen = Stop(-1)
    prune(model, config, output, seen, **how)
    return seen.seen


def test_finished_blocks_are_not_pruned_again(
    stopped: Start, models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    config = stopped(2)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    notes: list[str] = []
    done = again(models["llama"], config, tmp_path / "out", resume=True, on_note=notes.append)
    assert {block for block, _ in done} == {2, 3}
    assert notes[0] == "going on: 2 of 4 blocks done before"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    prune(models["llama"], config, tmp_path / "whole" / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


def test_streams_in_memory_and_on_disk_give_the_same(
    models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    for where in ("memory", "disk"):
        config = PruneConfig.of_quality("balanced", **settings(corpus), activations=where)
        prune(models["llama"], config, tmp_path / where / "out")
    memory, disk = (content(tmp_path / where / "out") for where in ("memory", "disk"))
    assert memory.pop("prune_report.json") != disk.pop("prune_report.json")  # it says where
    assert memory == disk


def test_a_run_may_go_on_where_its_streams_fit(
    stopped: Start, models: dict[str, Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    config = stopped(2, activations="disk")
    prune(models["llama"], replace(config, activations="memory"), tmp_path / "out", resume=True)
    prune(models["llama"], replace(config, activations="memory"), tmp_path / "whole" / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole" / "out")


class TestRefusals:
    """One line, and what was finished stays."""

    def refused(self, model: Path, config: PruneConfig, tmp_path: Path, match: str) -> None:
        before = content(tmp_path / ".out.partial")
        with pytest.raises(ValueError, match=match) as error:
            prune(model, config, tmp_path / "out", resume=True)
        assert "\n" not in str(error.value)
        after = content(tmp_path / ".out.partial")
        assert after.items() <= before.items()
        assert before.keys() - after.keys() <= {"weight-000003.part"}  # in no record

    def test_option(self, stopped: Start, models: dict[str, Path], tmp_path: Path) -> None:
        from dataclasses import replace

        config = replace(stopped(), pattern="0.6", damping=0.02)
        match = "pattern was 0.5, is 0.6, damping was 0.01, is 0.02; repeat its command"
        self.refused(models["llama"], config, tmp_path, match)

    def test_model(self, stopped: Start, models: dict[str, Path], tmp_path: Path) -> None:
        config = stopped()
        other = Path(shutil.copytree(models["llama"], tmp_path / "other"))
        file = other / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        self.refused(other, config, tmp_path, r"the model was \w{12}\.\.\..* is \w{12}\.\.\.")

    def test_text(self, stopped: Start, models: dict[str, Path], tmp_path: Path) -> None:
        config = stopped()
        text = Path(str(config.calibration))
        before = text.read_text()
        try:
            text.write_text(before.swapcase())
            match = r"the calibration text was \w{12}\.\.\."
            self.refused(models["llama"], config, tmp_path, match)
        finally:
            text.write_text(before)

    def test_mistyped_model(self, stopped: Start, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", stopped(), tmp_path, "no such directory|not a hub name")

    @pytest.mark.parametrize("kind", ["stream", "part", "jsonl"])
    @pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
    def test_damage(
        self, kind: str, how: str, stopped: Start, models: dict[str, Path], tmp_path: Path
    ) -> None:
        config = stopped()
        file = sorted((tmp_path / ".out.partial").glob(f"*.{kind}"))[0]
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(data if how == "flipped" else data[: len(data) // 2])
        if kind == "jsonl" and how != "flipped":  # the whole lines count
            prune(models["llama"], config, tmp_path / "out", resume=True)
            return
        self.refused(models["llama"], config, tmp_path, f"{file.name}: .*--restart")
        prune(models["llama"], config, tmp_path / "out", restart=True)
        assert (tmp_path / "out").is_dir()

    def test_neither_resumed_nor_restarted(
        self, stopped: Start, models: dict[str, Path], tmp_path: Path
    ) -> None:
        config = stopped()
        with pytest.raises(ValueError, match=r"2 of 4 blocks done; give --resume .* --restart"):
            prune(models["llama"], config, tmp_path / "out")
        with pytest.raises(ValueError, match="give one of them"):
            prune(models["llama"], config, tmp_path / "out", resume=True, restart=True)
        assert {b for b, _ in again(models["llama"], config, tmp_path / "out", restart=True)} == {
            0, 1, 2, 3,
        }  # fmt: skip

    def test_two_runs(self, stopped: Start, models: dict[str, Path], tmp_path: Path) -> None:
        config = stopped()
        (tmp_path / ".out.lock").touch()  # as a kill leaves it
        before = content(tmp_path / ".out.partial")
        with Staging(tmp_path / "out", resume=True) as staging:
            with pytest.raises(ValueError, match="another run is writing it"):
                prune(models["llama"], config, tmp_path / "out", resume=True)
            assert staging.found is not None and content(staging.directory) == before


def test_nothing_to_resume(models: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    config = PruneConfig(**settings(corpus), method="wanda")
    done = again(models["llama"], config, tmp_path / "out", resume=True, on_note=notes.append)
    assert {block for block, _ in done} == {0, 1, 2, 3}
    assert notes[0].startswith("nothing to resume")


def test_an_error_that_would_come_again_leaves_nothing(
    stopped: Start, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped()

    def broken(*_args: object) -> None:
        raise ValueError("as if weights were not finite")

    monkeypatch.setattr(sys.modules["prune_llm.prune"], "prune_block", broken)
    with pytest.raises(ValueError, match="not finite"):
        prune(models["llama"], config, tmp_path / "out", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_the_allocation_alone_is_kept(
    models: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PruneConfig(**settings(corpus), method="wanda", allocation="owl")
    with pytest.raises(KeyboardInterrupt):
        prune(models["llama"], config, tmp_path / "out", Stop(0, (tmp_path / "out", 2)))
    notes: list[str] = []
    monkeypatch.setattr("prune_llm.commits.make_plan", None)  # not made again
    prune(models["llama"], config, tmp_path / "out", resume=True, on_note=notes.append)
    assert notes[0] == "going on: the allocation done before"


def test_a_search_goes_on_behind_its_last_try(
    models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    config = PruneConfig(**settings(corpus), method="wanda")
    tries: list[str] = []

    def stop(progress: Progress) -> None:
        if progress.step.startswith("try 2") and progress.block == 2:
            raise KeyboardInterrupt

    def note(tried: Any) -> None:
        tries.append(f"{tried.sparsity:.2f}")

    with pytest.raises(KeyboardInterrupt):
        prune_within(models["llama"], MOST, config, tmp_path / "out", on_progress=stop, on_try=note)
    assert len(tries) == 1
    notes: list[str] = []
    pruned: list[tuple[str, int]] = []
    prune_within(
        models["llama"], MOST, config, tmp_path / "out", resume=True, on_note=notes.append,
        on_progress=lambda p: pruned.append((p.step, p.block)) if p.blocks else None,
    )  # fmt: skip
    told = re.fullmatch(
        r"going on: 1 sparsities and ([12]) of 4 blocks of .* done before", notes[0]
    )
    assert told is not None  # a block whose commit was waiting for its turn is pruned again
    assert not any(step.startswith("try 1") for step, _ in pruned)
    again = set(range(int(told[1]), 4))
    assert {block for step, block in pruned if step.startswith("try 2")} == again


def test_the_levels_reuse_the_pruned_model(
    models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    config = PruneConfig(**{**settings(corpus), "method": "wanda"})
    levels = SparsifyConfig(activation_sparsity=(0.3,), samples=4)

    def stop(progress: Progress) -> None:
        if not progress.blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(models["llama"], config, tmp_path / "out", stop, levels)
    seen = Stop(-1)
    prune(models["llama"], config, tmp_path / "out", seen, levels, resume=True)
    assert not any(phase == "pruned" for _, phase in seen.seen)


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        journal.append({"kind": "block", "index": number})
    content = journal.file.read_bytes()
    for size in range(len(content)):
        journal.file.write_bytes(content[:size])
        records, end = read_journal(journal.file)
        assert len(records) == content[:size].count(b"\n") and end <= size
        if size % 9 == 0:
            again = Journal(tmp_path)
            again.append({"kind": "block", "index": 7})
            found, _ = read_journal(journal.file)
            assert [r["index"] for r in found] == [*range(len(records)), 7]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_how_to_go_on(
    which: signal.Signals, models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "prune_llm", "prune", str(models["llama"]), "-o", "out",
               "--method", "wanda", "--calibration", str(corpus), "--samples", "100",
               "--seq-len", "32", "--batch-size", "1"]  # fmt: skip
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in the background made them ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        while run.poll() is None and not (journal.is_file() and b'"block"' in journal.read_bytes()):
            time.sleep(0.01)
        run.send_signal(which)
        _, said = run.communicate(timeout=60)
        assert run.returncode not in (0, None)
    assert "blocks done; the same command with --resume goes on" in said
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
