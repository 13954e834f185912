"""Every family: pruned by three methods in both stored forms, reloaded, and held to the promises.

What is checked reads the files and the models by itself, without the code that wrote them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_models import save_model, save_tokenizer
from torch import Tensor
from transformers.activations import SiLUActivation

import prune_llm
from prune_llm import PruneConfig, prune
from prune_llm import architecture as arch
from prune_llm import blocks as blocks_module
from prune_llm.block import Block
from prune_llm.blocks import Walk
from prune_llm.checkpoint import open_checkpoint
from prune_llm.convert import export, info
from prune_llm.experts import without_index
from prune_llm.job import Job
from prune_llm.methods.sparsegpt import SparseGPT
from prune_llm.report import PruneReport
from prune_llm.sparse_checkpoint import open_sparse
from prune_llm.sparse_experts import packed_weights
from prune_llm.statistics import Needs
from prune_llm.streams import hidden_of
from prune_llm_kernels import dispatch

METHODS = {"magnitude": "0.5", "wanda": "2:4", "sparsegpt": "0.5"}
CPU = torch.device("cpu")
TOKENS = torch.arange(3, 40).reshape(1, -1)
SETTINGS: dict[str, Any] = {"samples": 5, "seq_len": 24, "batch_size": 2, "device": "cpu"}


@dataclass
class Pruned:
    """A model in both forms, and what its blocks gave in memory after they were pruned."""

    source: Path
    dense: Path
    sparse: Path
    report: PruneReport
    outputs: list[Tensor]
    samples_ST: Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = FAMILIES[name].save(tmp_path_factory.mktemp(name) / "model")
        return found[name]

    return get


@pytest.fixture(scope="module", autouse=True)
def silu_of_each_element() -> Iterator[None]:
    """SiLU by an element's value alone. torch's rounds by where it lies as well: in the strided
    half of a product by gate and up, and in the last rows of an expert's, of which transformers
    has others than we."""

    def silu(_module: torch.nn.Module, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x.double()).to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiLUActivation, "forward", silu)
        yield


@pytest.fixture(scope="module")
def pruned(
    saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> Callable[[str, str], Pruned]:
    found: dict[tuple[str, str], Pruned] = {}

    def get(name: str, method: str) -> Pruned:
        if (name, method) not in found:
            folder = tmp_path_factory.mktemp(f"{name}-{method}")
            found[name, method] = _prune(saved(name), folder, name, method, corpus)
        return found[name, method]

    return get


def _prune(source: Path, folder: Path, name: str, method: str, corpus: Path) -> Pruned:
    outputs: list[Tensor] = []
    samples: list[Tensor] = []

    pass_on = Block.pass_on

    @torch.no_grad()
    def recorded(block: Block) -> None:
        """The stream is behind every block but the last, which nobody needs to run."""
        if not block._passed:
            last, stream = block.index + 1 == len(block.walk.architecture.blocks), block.stream
            if last:
                block.propagate()
                outputs.append(torch.cat(list(stream)))
            samples[:] = block.walk._batches
            pass_on(block)
            if not last:
                outputs.append(torch.cat(list(stream)))

    with pytest.MonkeyPatch.context() as patch:
        # a fused block rounds once where the model rounds after every operation
        patch.setattr(blocks_module, "agrees", lambda *_: False)
        patch.setattr(Block, "pass_on", recorded)
        shared = {**SETTINGS, "method": method, "pattern": METHODS[method]}
        shared |= {"calibration": str(corpus), "ignore": FAMILIES[name].ignore}
        report = prune(source, PruneConfig(**shared, format="dense"), folder / "dense")
        outputs.clear()
        prune(source, PruneConfig(**shared, format="sparse"), folder / "sparse")
    return Pruned(source, folder / "dense", folder / "sparse", report, outputs, torch.cat(samples))


@pytest.fixture
def backend_reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PRUNE_LLM_BACKEND", "reference")
    dispatch.backend_for.cache_clear()
    yield
    dispatch.backend_for.cache_clear()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits.float()  # type: ignore[no-any-return]


def load_plain(directory: Path) -> Any:
    """With transformers alone, as the checkpoint is stored; nothing missing, nothing unexpected."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def piece(stored: dict[str, Tensor], name: str) -> Tensor:
    """A tensor by the name that the report has for it: "experts.down_proj[3]" is one of a fused."""
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return stored[name] if match is None else stored[match[1]][int(match[2])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_files_hold_exactly_what_was_asked(name: str, method: str, pruned: Any) -> None:
    """Names, dtypes and shapes of the original; half of every pruned linear; all else untouched."""
    run = pruned(name, method)
    before, after = tensors(run.source), tensors(run.dense)
    assert before.keys() == after.keys()
    touched = {re.sub(r"\[\d+\]$", "", result.tensor) for result in run.report.linears}
    for key, original in before.items():
        assert after[key].dtype == original.dtype and after[key].shape == original.shape
        if key not in touched:
            assert torch.equal(bits(after[key]), bits(original)), key
        else:
            assert original.dtype == FAMILIES[name].dtype
    for result in run.report.linears:
        weight = piece(after, result.tensor)
        weight_OI = weight.T if result.transposed else weight
        zeros_OI = weight_OI == 0
        assert int(zeros_OI.sum()) == weight_OI.numel() // 2, result.name
        assert not bool((torch.signbit(weight_OI) & zeros_OI).any())
        if method == "wanda":
            assert bool((zeros_OI.reshape(-1, 4).sum(-1) == 2).all()), result.name
    if FAMILIES[name].experts == "fused":  # every expert's every slice
        fused = [key for key in touched if before[key].ndim == 3]
        pieces = sum(before[key].shape[0] for key in fused)
        assert len(fused) == 4 and sum("[" in r.tensor for r in run.report.linears) == pieces


def hidden_states(model: Any, samples_ST: Tensor) -> list[Tensor]:
    """What every block gives [S, T, D], in the batches that pruning ran; experts one at a time, as
    ours, where transformers may also multiply them together."""
    blocks = arch._decoder_blocks(model)[1]
    if FUSED_IN_MEMORY.search(str(model)):
        model.set_experts_implementation("eager")
    seen: list[list[Tensor]] = [[] for _ in blocks]
    handles = [
        block.register_forward_hook(lambda _m, _args, out, own=own: own.append(hidden_of(out)))
        for block, own in zip(blocks, seen, strict=True)
    ]
    with torch.no_grad():
        for batch in samples_ST.split(2):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(own) for own in seen]


# Llama 4's have one implementation
FUSED_IN_MEMORY = re.compile(r"\((?!Llama4)\w*Experts\(|: (?!Llama4)\w*Experts\(")


def assert_same(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == FAMILIES[name].dtype
    if FAMILIES[name].exact:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_reloaded_blocks_give_what_the_pruned_ones_in_memory_gave(
    name: str, method: str, pruned: Any
) -> None:
    run = pruned(name, method)
    found = hidden_states(load_plain(run.dense), run.samples_ST)
    assert len(found) == len(run.outputs) == 2
    for ours, theirs in zip(run.outputs, found, strict=True):
        assert_same(name, ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_walk_is_the_whole_model(name: str, saved: Any, monkeypatch: Any) -> None:
    """Nothing pruned: block by block from disk as the whole model in memory; sites are found."""
    monkeypatch.setattr(blocks_module, "agrees", lambda *_: False)
    directory, family = saved(name), FAMILIES[name]
    checkpoint = open_checkpoint(directory)
    ids = torch.randint(3, 200, (5, 24), generator=torch.Generator().manual_seed(0))
    expected = hidden_states(load_plain(directory), ids)
    walk = Walk(
        arch.build(directory, checkpoint.tensors), checkpoint, ids,
        lambda linears: arch.select(linears, family.ignore),
        device=CPU, dtype=family.dtype, batch_size=2, tick=lambda *_: None,
    )  # fmt: skip
    for block in walk:
        found = [without_index(site.name) for site in block.collect(Needs.GRAM)]
        if block.index == 1:
            assert tuple(dict.fromkeys(found)) == family.sites
            block.propagate()
            assert_same(name, torch.cat(list(block.stream)), expected[1])
        else:
            first = torch.cat(list(block.stream))
    assert bool(first.isfinite().all())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])  # with and without offsets
@pytest.mark.parametrize("name", FAMILIES)
def test_the_packed_form_is_the_dense_one(
    name: str, method: str, pruned: Any, tmp_path: Path
) -> None:
    """Bit for bit, both ways; the same counts; the same logits but for rounding."""
    run = pruned(name, method)
    export(run.sparse, tmp_path / "dense", "dense")
    export(run.dense, tmp_path / "sparse", "sparse")
    for one, other in (("dense", run.dense), ("sparse", run.sparse)):
        found, expected = tensors(tmp_path / one), tensors(other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    described = {form: info(getattr(run, form), verify=True) for form in ("dense", "sparse")}
    counts = [
        {kind.kind: (kind.count, kind.weights, kind.zeros) for kind in description.kinds}
        for description in described.values()
    ]
    assert counts[0] == counts[1] and described["sparse"].verified == len(tensors(run.dense))
    stored = open_sparse(run.sparse)
    assert {name.split("[")[0] for name in (r.tensor for r in run.report.linears)} >= set(
        stored.packed
    )
    expected_logits = logits(load_plain(run.dense))
    model = prune_llm.load(run.sparse)
    exact = 2e-2 if FAMILIES[name].dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits(model), expected_logits, rtol=exact, atol=exact)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_solved_together(
    name: str, pruned: Any, saved: Any, corpus: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As on a GPU: the same weights but for rounding, with the same counts and names."""
    alone = pruned(name, "sparsegpt")
    together: list[int] = []
    real = SparseGPT.solve_together

    def noted(self: SparseGPT, problems: Any) -> Any:
        together.append(len(problems))
        return real(self, problems)

    monkeypatch.setattr(SparseGPT, "solve_together", noted)
    monkeypatch.setattr(Job, "solves_together", True)
    shared = {**SETTINGS, "method": "sparsegpt", "pattern": METHODS["sparsegpt"]}
    shared |= {"calibration": str(corpus), "ignore": FAMILIES[name].ignore}
    report = prune(saved(name), PruneConfig(**shared, format="dense"), tmp_path / "out")
    assert together and max(together) > 1
    ours, theirs = ({r.tensor: r for r in found.linears} for found in (report, alone.report))
    assert ours.keys() == theirs.keys()
    for tensor, result in ours.items():
        assert (result.kept, result.method) == (theirs[tensor].kept, theirs[tensor].method)
        assert result.error == pytest.approx(theirs[tensor].error, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logits_in_reference_mode(name: str, pruned: Any, backend_reference: None) -> None:
    run = pruned(name, "sparsegpt")
    dense = load_plain(run.dense)
    if FUSED_IN_MEMORY.search(str(dense)):
        dense.set_experts_implementation("eager")
    ours, theirs = logits(prune_llm.load(run.sparse)), logits(dense)
    if FAMILIES[name].exact:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_models_are_saved_and_unpacked(name: str, pruned: Any, tmp_path: Path) -> None:
    run = pruned(name, "sparsegpt")
    model = prune_llm.load(run.sparse)
    model.save_pretrained(tmp_path / "again")
    expected = tensors(run.sparse)
    again = tensors(tmp_path / "again")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert torch.equal(logits(prune_llm.load(tmp_path / "again")), logits(model))
    model.dequantize().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    found, expected = tensors(tmp_path / "dense"), tensors(run.dense)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def deepseek_of_the_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, with the layer behind the last that transformers does not build."""
    family, folder = FAMILIES["deepseek_v3"], tmp_path_factory.mktemp("hub") / "model"
    save_model(folder, family.make(), family.dtype, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    extra = {"model.layers.61.eh_proj.weight": torch.ones(32, 64, dtype=torch.bfloat16)}
    save_file(extra, folder / "model-extra.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(extra, "model-extra.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_and_tensors_that_no_module_has(deepseek_of_the_hub: Path, tmp_path: Path) -> None:
    """They are carried along, byte for byte, in both forms."""
    source = deepseek_of_the_hub
    for form in ("dense", "sparse"):
        report = prune(source, PruneConfig(method="magnitude", format=form), tmp_path / form)
        stored = tensors(tmp_path / form)
        assert torch.equal(stored["model.layers.61.eh_proj.weight"], torch.ones(32, 64).bfloat16())
        assert not any("61" in result.name for result in report.linears)
    assert tensors(tmp_path / "dense").keys() == tensors(source).keys()
    packed = logits(prune_llm.load(tmp_path / "sparse"))
    torch.testing.assert_close(packed, logits(load_plain(tmp_path / "dense")), rtol=2e-2, atol=2e-2)


def test_quantised_experts_are_refused(saved: Any, tmp_path: Path, cli: Any) -> None:
    """gpt-oss as it was released: MXFP4 blocks and scales."""
    directory = Path(shutil.copytree(saved("gpt_oss"), tmp_path / "model"))
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(settings))
    result = cli("prune", directory, "-o", tmp_path / "out", "--method", "magnitude")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "already quantised or pruned (quant_method 'mxfp4')" in result.output


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def with_vision(name: str) -> tuple[Any, str]:
    """The config of a model whose decoder transformers builds alone, and its class."""
    import transformers as tf

    text = FAMILIES[name].settings
    if name == "llama4":
        sizes = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
        return (
            tf.Llama4Config(text_config=text, vision_config={**VISION, **sizes}),
            "Llama4ForConditionalGeneration",
        )
    sizes = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = tf.Qwen3_5MoeConfig(text_config=text, vision_config={**VISION, **sizes})
    return config, "Qwen3_5MoeForConditionalGeneration"


@pytest.mark.parametrize("name", ["llama4", "qwen3_next"])
def test_the_decoder_of_a_model_with_vision(name: str, tmp_path: Path, corpus: Path) -> None:
    """As Llama 4 and Qwen 3.5 lie on the hub: other names, and vision that is carried along."""
    import transformers as tf

    config, kind = with_vision(name)
    torch.manual_seed(0)
    getattr(tf, kind)(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    for form in ("dense", "sparse"):
        settings = PruneConfig(calibration=str(corpus), format=form, **SETTINGS)
        report = prune(tmp_path / "model", settings, tmp_path / form)
        assert any(
            "belong to no module" in w and "copied as they are" in w for w in report.warnings
        )
    before, after = tensors(tmp_path / "model"), tensors(tmp_path / "dense")
    assert before.keys() == after.keys()
    vision = [key for key in before if "vision" in key or "visual" in key]
    assert vision and all(torch.equal(before[key], after[key]) for key in vision)
    whole, found = getattr(tf, kind).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(found.values())
    packed = prune_llm.load(tmp_path / "sparse")
    assert packed_weights(packed)
    torch.testing.assert_close(logits(packed), logits(whole), rtol=1e-4, atol=1e-5)


def test_the_table_in_the_readme_is_of_these_families() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    _, _, below = readme.partition("| family | prunes | reloads | packed | exact |")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    assert rows == [family.row() for family in FAMILIES.values()]
