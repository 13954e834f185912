"""Two processes that share the calibration samples against one that has them all."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SIZES, llama_config, save_model

from prune_llm import PruneConfig, prune
from prune_llm.pruning_level import prune_within
from prune_llm.ranks import ALONE, Ranks
from prune_llm.sparse_checkpoint import open_sparse
from prune_llm.statistics import InputStatistics, Needs

# run in each process: every job of a file, then one that is refused
DRIVER = """
import json, os, sys
from prune_llm import PruneConfig, prune

model, moe, folder, jobs = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
for name, options in jobs.items():
    report = prune(moe if "moe" in name else model, PruneConfig(**options), f"{folder}/{name}")
    assert report.output == f"{folder}/{name}" and report.verification, "all know the report"
    assert report.environment["processes"] == "2"
for options, resume, message in (
    ({"reconstruction": "block"}, False, "reconstruction 'block': runs in one process, and 2 were"),
    ({}, True, "resume: runs in one process"),
    ({"samples": 1}, False, "samples 1: fewer than the 2 processes"),
    ({"method": "magnitude"}, False, "exists and is not empty"),
):
    try:
        prune(model, PruneConfig(**options), f"{folder}/{name}-again" if "samples" in options
              else f"{folder}/{name}", resume=resume)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"not refused: {message}")
assert sorted(os.listdir(folder)) == sorted(["driver.py", *jobs]), "refused runs left something"
print("all done")
"""
# a CPU counts as a device: `--cpu` of accelerate would start one process
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
    ],
}
SHARED = {"samples": 7, "seq_len": 48, "batch_size": 2, "format": "dense"}
JOBS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt-4of8": {"method": "sparsegpt", "pattern": "4:8"},
    "dsnot": {"method": "dsnot"},
    "balanced": {"method": "wanda", "target": "dense", "refine": "backsolve"},
    "error": {"method": "sparsegpt", "allocation": "error"},
    "owl": {"method": "wanda", "allocation": "owl"},
    "moe": {"method": "wanda", "target": "dense"},
    "moe-sparsegpt": {"method": "sparsegpt"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import MixtralConfig

    folder = tmp_path_factory.mktemp("models")
    moe = MixtralConfig(
        **{**SIZES, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    )
    return {
        "llama": save_model(folder / "llama", llama_config()),
        "moe": save_model(folder / "moe", moe),
    }


def launch(*arguments: str | Path, count: int = 2) -> list[str]:
    """What each process prints; started as launchers start them, at a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)
    return printed


@pytest.fixture(scope="module")
def together(
    models: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The outputs of all jobs by two processes."""
    folder = tmp_path_factory.mktemp("together")
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    jobs = {name: {**SHARED, **job, "calibration": str(corpus)} for name, job in JOBS.items()}
    printed = launch(driver, models["llama"], models["moe"], folder, json.dumps(jobs))
    assert all("all done" in text for text in printed)
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_prune_as_one(
    name: str, together: Path, models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    config = PruneConfig(**{**SHARED, **JOBS[name], "calibration": str(corpus)})
    report = prune(models["moe" if "moe" in name else "llama"], config, tmp_path / "one")
    one = load_file(tmp_path / "one" / "model.safetensors")
    two = load_file(together / name / "model.safetensors")
    assert one.keys() == two.keys()
    agree = total = 0
    for key, weight in one.items():
        both = (weight != 0) & (two[key] != 0)
        agree += int(((weight != 0) == (two[key] != 0)).sum())
        total += weight.numel()
        torch.testing.assert_close(weight[both], two[key][both], rtol=2e-3, atol=2e-4)
    # sums in another order: float32 rounds the scores of near ties otherwise
    assert agree >= 0.999 * total
    found = json.loads((together / name / "prune_report.json").read_text())
    assert [r["kept"] for r in found["linears"]] == [r.kept for r in report.linears]
    for told, result in zip(found["linears"], report.linears, strict=True):
        assert (told["error"] is None) == (result.error is None)
        assert told["bytes_after"] == result.bytes_after
        if result.error is not None:  # on other tokens, where shares cut other batches
            assert told["error_tokens"] == pytest.approx(result.error_tokens, rel=0.5)
            assert told["error"] == pytest.approx(result.error, rel=0.3)


@pytest.fixture(scope="module")
def of_one(models: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the launched command writes, by this process alone."""
    config = PruneConfig(method="wanda", calibration=str(corpus), samples=4, seq_len=32)
    output = tmp_path_factory.mktemp("one") / "out"
    prune(models["llama"], config, output)
    return output


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_of_each_launcher(
    launcher: str,
    of_one: Path,
    models: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Two processes, told of once, that write the weights of one."""
    options = ["--calibration", corpus, "--samples", 4, "--seq-len", 32, "--method", "wanda"]
    command = ["-m", "prune_llm", "prune", models["llama"], "-o", tmp_path / "out", *options]
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *map(str, command)],
        # accelerate takes options from a file there
        env={**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("home"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("next: ") == 1
    report = json.loads((tmp_path / "out" / "prune_report.json").read_text())
    assert report["environment"]["processes"] == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    one, two = open_sparse(of_one), open_sparse(tmp_path / "out")
    assert set(one.packed) == set(two.packed) and one.names == two.names
    for name in one.names:
        assert torch.equal(one.read(name), two.read(name)), name


REFUSED: dict[str, tuple[dict[str, Any], bool]] = {
    "resume": ({}, True),
    "reconstruction 'block'": ({"reconstruction": "block"}, False),
    "reconstruction 'logits'": ({"reconstruction": "logits"}, False),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a launcher had started this process and two others."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", **address}.items():
        monkeypatch.setenv(name, value)
    # the others never come: what is not refused would wait for them, not fail
    monkeypatch.setattr(torch.distributed, "init_process_group", _not_met)


def _not_met(backend: str, timeout: timedelta) -> None:
    raise AssertionError("not refused before the processes meet")


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("what", REFUSED)
def test_what_runs_in_one_process_is_refused_in_several(
    what: str, models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    options, resume = REFUSED[what]
    config = PruneConfig(**SHARED, calibration=str(corpus), **options)
    with pytest.raises(ValueError, match=one_line(what)):
        prune(models["llama"], config, tmp_path / "out", resume=resume)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("resume", [False, True])
def test_a_search_is_refused_in_several_processes(
    resume: bool, models: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    config = PruneConfig(**SHARED, calibration=str(corpus))
    with pytest.raises(ValueError, match=one_line("max_ppl_increase")):
        prune_within(models["llama"], 0.05, config, tmp_path / "out", resume=resume)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("launched")
def test_the_command_refuses_a_search_in_one_line(
    models: dict[str, Path], corpus: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    options = ("--max-ppl-increase", "5%", "--calibration", corpus)
    done = cli("prune", models["llama"], "-o", tmp_path / "out", *options)
    assert done.exit_code == 2 and re.search(one_line("max_ppl_increase"), done.stderr.strip())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("command", ["sparsify", "compare", "sweep", "eval", "serve"])
def test_commands_that_share_no_work_are_refused(
    command: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Before they look at anything: each process would do all of it, and write to one place."""
    done = cli(command, tmp_path / "nothing")
    assert done.exit_code == 2 and re.search(one_line(command), done.stderr.strip())


def one_line(what: str) -> str:
    """The message for what runs in one process, where three were started."""
    fix = "start it without torchrun or accelerate launch"
    return re.escape(f"{what}: runs in one process, and 3 were started; {fix}") + r"\Z"


def test_alone_everything_is_as_it_was() -> None:
    samples_ST = torch.arange(6).reshape(3, 2)
    assert ALONE.first and torch.equal(ALONE.share(samples_ST), samples_ST)
    assert ALONE.of_all("x") == ["x"] and ALONE.of_first("x") == "x"
    assert ALONE.done_by_first(lambda: 5) == 5
    with pytest.raises(ValueError, match="no"):
        ALONE.done_by_first(_refused)


def _refused() -> None:
    raise ValueError("no")


@pytest.mark.parametrize(("samples", "count"), [(7, 2), (8, 3), (5, 5)])
def test_shares_are_all_samples_in_order(samples: int, count: int) -> None:
    samples_ST = torch.arange(samples * 2).reshape(samples, 2)
    shares = [Ranks(rank, count).share(samples_ST) for rank in range(count)]
    assert torch.equal(torch.cat(shares), samples_ST)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_samples_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="samples 2: fewer than the 3 processes that share them; "):
        Ranks(1, 3).share(torch.zeros(2, 4))


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    cuda = torch.device("cuda")
    assert Ranks(1, 3).device(cuda) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "0")  # of another machine's first process
    assert Ranks(2, 3).device(cuda) == torch.device("cuda", 0)
    for asked in ("cpu", "cuda:1"):
        assert Ranks(2, 3).device(torch.device(asked)) == torch.device(asked)
    assert ALONE.device(cuda) == cuda
    assert taken == [1, 0]


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "device 'cuda': process 2 of this machine has none of its 2 CUDA devices; start as"
    with pytest.raises(ValueError, match=f"^{message} many processes as devices$"):
        Ranks(2, 3).device(torch.device("cuda"))


def test_statistics_of_one_process_need_no_sum() -> None:
    statistics = InputStatistics(4, torch.device("cpu"), Needs.GRAM)
    x_TI = torch.randn(9, 4)
    statistics.update(x_TI, sample=2)
    statistics.add_up(ALONE)
    statistics.finish()
    torch.testing.assert_close(statistics.gram_II, x_TI.T @ x_TI)
