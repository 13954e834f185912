"""The whole pipeline on random small models, patterns and options, and on damaged directories."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import llama_config, save_model
from torch import Tensor

from prune_llm import PruneConfig, export, info, prune
from prune_llm.allocation import ALLOCATIONS
from prune_llm.architecture import build
from prune_llm.checkpoint import open_checkpoint
from prune_llm.masks import Pattern, check_keep_mask
from prune_llm.methods import METHODS
from prune_llm.refinement import REFINEMENTS
from prune_llm.report import PruneReport


@st.composite
def architectures(draw: st.DrawFn) -> Any:
    """Small decoders of several kinds, of widths that divide nothing in particular."""
    from transformers import GPT2Config, MixtralConfig, OPTConfig, Qwen2Config

    heads = draw(st.sampled_from([1, 2, 4]))
    width = heads * draw(st.sampled_from([4, 6, 10, 16]))
    inner = draw(st.integers(5, 70))
    layers = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["llama", "qwen2", "gpt2", "opt", "mixtral"]))
    tied = draw(st.booleans())
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=264,
            n_embd=width,
            n_inner=inner,
            n_layer=layers,
            n_head=heads,
            n_positions=64,
        )
    if kind == "opt":
        return OPTConfig(
            vocab_size=264, hidden_size=width, ffn_dim=inner, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=64, word_embed_proj_dim=width,
        )  # fmt: skip
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
    }
    if kind == "mixtral":
        return MixtralConfig(
            vocab_size=264, initializer_range=0.1, num_local_experts=3, num_experts_per_tok=2,
            **sizes,
        )  # fmt: skip
    if kind == "qwen2":
        return Qwen2Config(vocab_size=264, initializer_range=0.1, **sizes)
    return llama_config(**sizes)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Of `PruneConfig`, such as go together."""
    groups = [f"{n}:{m}" for m in (2, 3, 4, 8) for n in range(1, m)]
    shares = st.floats(0.02, 0.95).map(lambda share: f"{share:.3f}")
    pattern = draw(shares | st.sampled_from(groups))
    method = draw(st.sampled_from(sorted(METHODS)))
    found: dict[str, Any] = {
        "method": method,
        "pattern": pattern,
        "seed": draw(st.integers(0, 9)),
        "samples": draw(st.integers(1, 5)),
        "seq_len": draw(st.integers(2, 24)),
        "batch_size": draw(st.sampled_from([None, 1, 2, 4])),
        "target": draw(st.sampled_from(["pruned", "dense"])),
        "refine": draw(st.sampled_from(sorted(REFINEMENTS))),
        "format": draw(st.sampled_from(["dense", "sparse"])),
        "activations": draw(st.sampled_from(["memory", "disk"])),
    }
    if ":" not in pattern:
        found["allocation"] = draw(st.sampled_from(sorted(ALLOCATIONS)))
    return found


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(config=architectures(), chosen=options(), half=st.booleans())
def test_any_model_any_options(
    config: Any, chosen: dict[str, Any], half: bool, corpus: Path
) -> None:
    """It prunes what was asked to the last weight and leaves the rest, or refuses in one line."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = save_model(place / "model", config, torch.bfloat16 if half else torch.float32)
        try:
            asked = PruneConfig(calibration=str(corpus), device="cpu", **chosen)
            report = prune(model, asked, place / "out")
        except ValueError as error:
            assert "\n" not in str(error) and str(error), error
            assert {path.name for path in place.iterdir()} == {"model"}
            return
        assert {path.name for path in place.iterdir()} == {"model", "out"}
        assert info(place / "out", verify=True).verified
        dense = place / "out"
        if chosen["format"] == "sparse":
            export(place / "out", place / "dense", "dense")
            dense = place / "dense"
        check(model, dense, report, chosen["pattern"])


def check(model: Path, dense: Path, report: PruneReport, pattern: str) -> None:
    """Counted anew from the files."""
    before, after = open_checkpoint(model).tensors, open_checkpoint(dense).tensors
    assert before.keys() == after.keys()
    pruned = {result.tensor: result for result in report.linears}
    architecture = build(model, before)
    linears = [
        linear
        for index in range(len(architecture.blocks))
        for linear in architecture.linears(index)
    ]
    assert {architecture.disk_names[linear.weight_name] for linear in linears} == pruned.keys()
    for name, stored in before.items():
        weight, was = after[name].read(), stored.read()
        assert weight.dtype == was.dtype and bool(weight.isfinite().all())
        if name not in pruned:
            assert torch.equal(weight, was), name
            continue
        assert not _negative_zeros(weight), name
        result = pruned[name]
        assert int((weight != 0).sum()) == result.nonzero <= result.kept
        weight_OI = weight.T if result.transposed else weight
        if ":" in pattern:  # a kept weight may be zero itself: at most as many as the pattern keeps
            assert _most_in_a_group(weight_OI, Pattern.parse(pattern)) <= 0
    if ":" not in pattern:
        total = sum(result.weights for result in report.linears)
        lost = total - sum(result.kept for result in report.linears)
        # each linear rounds to whole weights
        assert abs(lost - float(pattern) * total) <= len(report.linears)


def _negative_zeros(weight: Tensor) -> bool:
    return bool((torch.signbit(weight) & (weight == 0)).any())


def _most_in_a_group(weight_OI: Tensor, pattern: Pattern) -> int:
    """By how much the fullest group exceeds what the pattern keeps; a short last one is scaled."""
    assert pattern.n is not None and pattern.m is not None
    excess = -weight_OI.shape[1]
    for start in range(0, weight_OI.shape[1], pattern.m):
        group = weight_OI[:, start : start + pattern.m]
        most = math.ceil(pattern.n * group.shape[1] / pattern.m)
        excess = max(excess, int((group != 0).sum(dim=1).max()) - most)
    return excess


def test_the_check_notices_one_weight_too_many(tmp_path: Path) -> None:
    keep_OI = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert check_keep_mask(keep_OI, Pattern.parse("2:4"), "row") is not None
    assert _most_in_a_group(keep_OI.float(), Pattern.parse("2:4")) == 1


# -- damaged directories --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return save_model(folder / "model", llama_config(num_hidden_layers=2), max_shard_size="60KB")


@pytest.fixture
def damaged(sharded: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(sharded, tmp_path / "model")
    yield tmp_path / "model"


def damage(file: Path, random_: random.Random) -> str:
    """Change bytes of the beginning, where headers and JSON are, cut, grow or empty a file."""
    content = bytearray(file.read_bytes())
    how = random_.choice(["bytes", "bytes", "bytes", "digits", "cut", "grow", "empty"])
    if how == "bytes":
        for _ in range(random_.randint(1, 4)):
            content[random_.randrange(min(len(content), 4000))] = random_.randrange(256)
    elif how == "digits":
        places = [i for i, byte in enumerate(content[:4000]) if chr(byte).isdigit()]
        for place in random_.sample(places, min(len(places), 3)):
            content[place] = ord(random_.choice("0123456789"))
    elif how == "cut":
        del content[random_.randrange(len(content)) :]
    elif how == "grow":
        content += random_.randbytes(random_.randint(1, 100))
    else:
        content.clear()
    file.write_bytes(bytes(content))
    return how


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_end_in_one_line(
    seed: int, damaged: Path, corpus: Path, cli: Any, tmp_path: Path
) -> None:
    """Or prune, where the damage is none that can be seen; never a traceback or half an output."""
    random_ = random.Random(seed)
    files = ["config.json", "model.safetensors.index.json"]
    files += [path.name for path in sorted(damaged.glob("*.safetensors"))[:2]]
    name = random_.choice(files)
    how = damage(damaged / name, random_)
    options = ["--method", "wanda", "--calibration", corpus, "--samples", 2, "--seq-len", 8]
    result = cli("prune", damaged, "-o", tmp_path / "out", "--device", "cpu", *options)
    case = f"{name}, {how}: {result.output}\n{result.exception!r}"
    if result.exit_code == 0:
        assert info(tmp_path / "out", verify=True).verified, case
        return
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), case
    lines = [line for line in result.output.splitlines() if not line.startswith("needs about ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), case
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}, case


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 1.5, 1 << 62, True])
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "rope_parameters", "architectures"]
)
def test_strange_values_in_the_configuration_end_in_one_line(
    key: str, value: Any, damaged: Path, corpus: Path, cli: Any, tmp_path: Path
) -> None:
    file = damaged / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    options = ["--method", "wanda", "--calibration", corpus, "--samples", 2, "--seq-len", 8]
    result = cli("prune", damaged, "-o", tmp_path / "out", "--device", "cpu", *options)
    case = f"{key} {value!r}: {result.output}\n{result.exception!r}"
    if result.exit_code != 0:
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), case
        assert "Traceback" not in result.output and "error: " in result.output, case
        assert {path.name for path in tmp_path.iterdir()} <= {"model"}, case
