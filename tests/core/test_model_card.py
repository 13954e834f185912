"""Model cards: what they tell is in the reports, and nothing in a name can break them."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny_models import llama_config, save_model

from prune_llm import PruneConfig, export, prune
from prune_llm.activation.sparsify import SparsifyConfig, sparsify
from prune_llm.card_facts import (
    Base,
    CardFacts,
    add_measured,
    hub_name,
    read_base,
    read_facts,
    read_metadata,
    shown_text,
)
from prune_llm.card_markdown import clean, code, escape, fenced, table
from prune_llm.model_card import card, update_figures

BASE_CARD = """---
license: other
license_name: tiny-terms
license_link: https://example.org/terms
language:
- en
- tr
tags:
- stories
---
# A dense model
"""
# what a name, a text or a licence may hold
HOSTILE = [
    "---\nlicense: mit\n---",
    "a: [b, {c: d}] # e",
    "'single' \"double\" `one` ```three```",
    "| pipe | and \\ backslash",
    "<script>alert(1)</script> &amp; <!-- /prune-llm:figures -->",
    "*stars* __under__ ~~gone~~ [link](https://example.org) ![x](y)",
    "\u202eright to left\u2028line\x00nul",
    "- list",
    "1. numbered",
    "# heading",
    "$$math$$",
    "!!python/object:os.system {}",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the hub's cache has it: tiny/stories with a card."""
    place = tmp_path_factory.mktemp("hub") / "models--tiny--stories" / "snapshots" / "0123abcd"
    save_model(place, llama_config())
    (place / "README.md").write_text(BASE_CARD)
    return place


@pytest.fixture(scope="module")
def pruned(base: Path, corpus: Path) -> Path:
    config = PruneConfig(
        method="wanda", pattern="2:4", calibration=str(corpus), samples=12, seq_len=32, device="cpu"
    )
    levels = SparsifyConfig(activation_sparsity=(0.3,), allocation="uniform", samples=12)
    prune(base, config, base.parent / "pruned", levels=levels)
    return base.parent / "pruned"


def parsed(text: str) -> Any:
    """As the hub's library reads it."""
    return ModelCard(text, ignore_metadata_errors=False)


def test_the_card_of_a_pruned_model(pruned: Path, corpus: Path) -> None:
    text = (pruned / "README.md").read_text()
    data = parsed(text).data
    assert (data.base_model, data.base_model_relation) == ("tiny/stories", "quantized")
    assert data.license == "other" and data.license_name == "tiny-terms"
    assert data.license_link == "https://example.org/terms" and data.language == ["en", "tr"]
    assert (data.library_name, data.pipeline_tag) == ("prune-llm", "text-generation")
    assert set(data.tags) == {
        "prune-llm",
        "sparse",
        "pruned",
        "wanda",
        "2:4",
        "activation-sparsity",
    }
    assert data.eval_results is None  # nothing was measured on a text of its own
    report = json.loads((pruned / "prune_report.json").read_text())
    for told in (
        "# pruned", "[tiny/stories](https://huggingface.co/tiny/stories)", "50.0% of its linears",
        "wanda", "2 of every 4", "12 samples of 32 tokens", report["calibration"]["sha256"][:16],
        report["model_sha256"][:16], "`mlp.down_proj`", report["environment"]["torch"],
        "import prune_llm", "prune-llm serve pruned", "--level 30%", "finds no `model.safetensors`",
    ):  # fmt: skip
        assert told in text, told
    assert str(corpus.parent) not in text and str(pruned.parent) not in text  # no paths
    level = json.loads((pruned / "activation_report.json").read_text())["levels"][0]
    assert f"{level['texts']['held_out']['ppl']:.4g}" in text


def test_sparsity_and_bytes_by_kind_are_the_reports(pruned: Path) -> None:
    facts = read_facts(pruned, pruned, "pruned")
    report = facts.pruning
    rows = [line for line in card(facts).splitlines() if line.startswith("| `")]
    assert len(rows) == 7
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        own = [entry for entry in report["linears"] if f"`{entry['kind']}`" == cells[0]]
        kept, weights = sum(e["kept"] for e in own), sum(e["weights"] for e in own)
        assert cells[1:3] == [str(len(own)), f"{1 - kept / weights:.2%}"]
        assert cells[3] == f"{sum(e['error'] for e in own) / len(own):.4f}"


def test_what_is_made_of_it_keeps_base_and_licence(pruned: Path, tmp_path: Path) -> None:
    export(pruned, tmp_path / "dense", "dense")
    dense = parsed((tmp_path / "dense" / "README.md").read_text())
    assert (dense.data.base_model, dense.data.library_name) == ("tiny/stories", "transformers")
    assert dense.data.license_name == "tiny-terms"
    assert "import prune_llm" not in dense.text and "zeros are stored as zeros" in dense.text
    assert "activation level" not in dense.text  # the dense form holds none
    config = SparsifyConfig(
        activation_sparsity=(0.2,), allocation="uniform", samples=12, seq_len=32, device="cpu"
    )
    sparsify(tmp_path / "dense", config, tmp_path / "levels")
    found = parsed((tmp_path / "levels" / "README.md").read_text())
    assert found.data.base_model == "tiny/stories" and found.data.language == ["en", "tr"]
    assert "| 20% |" in found.text and "# levels" in found.text


def test_the_base_without_a_card_or_a_name(tiny_llama: Path, tmp_path: Path) -> None:
    prune(tiny_llama, PruneConfig(method="magnitude", device="cpu"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    data = parsed(text).data
    assert data.base_model is None and data.license is None and data.language is None
    assert not hasattr(data, "base_model_relation")
    assert "biases and licence are those of the base model" in text
    assert "Not measured yet" in text and "unstructured" in data.tags
    for content in (
        "no front matter",
        "---\n- a list\n---\n",
        "---\n{: broken\n---\n",
        b"\xff\xfe",
    ):
        folder = tmp_path / f"base-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        file = folder / "README.md"
        file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
        assert read_base(folder) == Base(folder.name)


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text("{}[]:,-\n '\"&*!|>%@#ab12.", max_size=60).map(str.encode),
        st.sampled_from(
            [b"language: 5", b"language: {en: 1}", b"license: [mit]", b"1: 2", b"a: 2026-13-45",
             b"a: *b", b"a: &a [*a]", b"tags: prune-llm", b"[" * 5000, b"base_model: [x]"]
        ),
    )
)  # fmt: skip
def test_no_card_of_a_base_model_stops_a_run(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "README.md").write_bytes(b"---\n" + content + b"\n---\n")
        found = read_base(Path(folder))
    assert all(isinstance(text, str) for text in (*found.language, *found.licence.values()))


def test_names_of_the_hub() -> None:
    assert hub_name("/x/hub/models--org--name.v1/snapshots/0a1b") == "org/name.v1"
    assert hub_name("/x/models--gpt2/snapshots/0a1b/") == "gpt2"
    assert hub_name("/home/me/models--org--name") is None
    assert shown_text("/home/me/secret place/text.txt") == "text.txt"
    assert shown_text("wikitext:wikitext-2-raw-v1:test") == "wikitext:wikitext-2-raw-v1:test"
    assert shown_text("org/data:config") == "org/data:config"


def facts_named(name: str, pruned: Path) -> CardFacts:
    """Every text that comes from elsewhere is ``name``."""
    facts = read_facts(pruned, pruned, "pruned")
    pruning = json.loads(json.dumps(facts.pruning))
    pruning["config"] |= {"method": name, "pattern": name, "seed": name, "target": name}
    pruning["calibration"] |= {"source": name, "sha256": name}
    pruning["environment"] |= {"device": name, "torch": name}
    for entry in pruning["linears"]:
        entry["kind"] = name
    levels = json.loads(json.dumps(facts.levels))
    levels["levels"][0]["name"] = name
    measured = (
        {
            "kind": "text", "on": name, "seq_len": 32, "tokens": 99, "device": name, "date": name,
            "dense": {"token_ppl": 3.0}, "rows": [{"level": name, "token_ppl": 4.0}],
        },
        {
            "kind": "tasks", "on": name, "lm_eval": name, "device": name,
            "rows": [{"task": name, "metric": name, "filter": name, "level": name, "value": 0.5,
                      "stderr": 0.1, "documents": 4, "num_fewshot": 0}],
        },
        {"kind": name, "on": name},
    )  # fmt: skip
    base = Base(name, None, {"license": name, "license_name": name}, (name,))
    return replace(facts, name=name, base=base, pruning=pruning, levels=levels, measured=measured)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(name: str, pruned: Path) -> None:
    """The card has the blocks of an ordinary one, its metadata the very names."""
    usual, text = card(facts_named("name", pruned)), card(facts_named(name, pruned))
    parser = MarkdownIt("commonmark").enable("table")
    blocks = [
        [token.type for token in parser.parse(body(x)) if token.level < 2] for x in (usual, text)
    ]
    assert blocks[0] == blocks[1]
    inline = {token.type for top in parser.parse(body(text)) for token in top.children or []}
    assert inline <= {"text", "code_inline"}, inline
    data = parsed(text).data
    assert data.license == data.license_name == data.language[0] == clean(name)
    assert data.eval_results[0].dataset_name == clean(shown_text(name))
    assert text.splitlines().count("<!-- /prune-llm:figures -->") == 1


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def test_markdown_pieces() -> None:
    assert clean(" a\n\tb\x00 ") == "a b" and clean("\n") == "?"
    assert escape("1. a_b") == "1\\. a\\_b" and escape("0.5") == "0.5" and escape("-x") == "\\-x"
    assert code("a`b") == "`` a`b ``" and code("a") == "`a`"
    assert fenced("sh", "```") == "````sh\n```\n````"
    assert table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# -- figures ---------------------------------------------------------------------------------


ENTRY: dict[str, Any] = {
    "kind": "text", "on": "/somewhere/held_out.txt", "seq_len": 32, "windows": 5, "tokens": 155,
    "dense": {"token_ppl": 4.0}, "device": "a CPU", "dtype": "float32", "date": "2026-11-28",
    "rows": [{"level": "dense", "token_ppl": 5.0, "kl": 0.25, "flips": 0.125, "skipped": None},
             {"level": "30%", "token_ppl": 6.0, "kl": 0.5, "flips": 0.25, "skipped": 0.3}],
}  # fmt: skip


def test_figures_go_into_an_edited_card(pruned: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "pruned"))
    file = directory / "README.md"
    edited = file.read_text().replace("## Limits", "My own words.\n\n## Limits")
    edited = edited.replace("tags:\n", "widget:\n- text: Hello\ntags:\n- mine\n")
    file.write_text(edited)
    add_measured(directory, ENTRY)
    update_figures(directory)
    text = file.read_text()
    data = parsed(text).data
    assert "My own words." in text and data.widget == [{"text": "Hello"}] and "mine" in data.tags
    assert "| this model | 5 (+25.0%) | 0.2500 | 12.50% |  |" in text
    assert "| at level 30% | 6 (+50.0%) | 0.5000 | 25.00% | 30.0% |" in text
    assert "155 predicted tokens of held\\_out.txt in windows of 32" in text
    assert [(r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("token perplexity", 5.0), ("token perplexity, level 30%", 6.0)
    ]  # fmt: skip
    again = dict(ENTRY, rows=[dict(ENTRY["rows"][0], token_ppl=4.5)])
    add_measured(directory, again)  # the same text: in its place
    add_measured(directory, dict(again, seq_len=16))
    update_figures(directory)
    results = parsed(file.read_text()).data.eval_results
    assert [r.metric_value for r in results if r.metric_name == "token perplexity"] == [4.5, 4.5]
    assert len(json.loads((directory / "measured.json").read_text())) == 2


def test_figures_travel_with_the_weights_and_not_further(pruned: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "pruned"))
    add_measured(directory, ENTRY)
    export(directory, tmp_path / "dense", "dense")
    assert "5 (+25.0%)" in (tmp_path / "dense" / "README.md").read_text()
    prune(tmp_path / "dense", PruneConfig(method="magnitude", pattern="0.7"), tmp_path / "more")
    assert not (tmp_path / "more" / "measured.json").exists()
    assert "5 (+25.0%)" not in (tmp_path / "more" / "README.md").read_text()


def test_a_card_without_its_region_is_refused(pruned: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "pruned"))
    (directory / "README.md").write_text("mine alone\n")
    with pytest.raises(ValueError, match="has no lines '<!-- prune-llm:figures -->'"):
        update_figures(directory)
    assert (directory / "README.md").read_text() == "mine alone\n"
    (directory / "README.md").unlink()
    update_figures(directory)
    assert read_metadata(directory / "README.md")["library_name"] == "prune-llm"
    (directory / "measured.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a list of measurements"):
        update_figures(directory)
    for metadata, message in (
        ("a: [b", "the metadata at its top cannot be read"),
        ("- a", "is no table of names"),
        ("model-index: 3", "model"),
    ):
        text = f"---\n{metadata}\n---\n" + card(read_facts(pruned, pruned, "x"))
        (directory / "README.md").write_text(text)
        with pytest.raises(ValueError, match=f"README.md: .*{message}.*; mend it first"):
            update_figures(directory)
        assert (directory / "README.md").read_text() == text


def test_eval_puts_its_figures_into_the_card(
    cli: Any, pruned: Path, base: Path, corpus: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(pruned, tmp_path / "pruned"))
    result = cli(
        "eval", directory, "--against", base, "--text", corpus, "--seq-len", 32, "--windows", 4,
        "--level", "30%", "--device", "cpu", "--update-card", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    dense, own, level = json.loads((tmp_path / "rows.json").read_text())
    (entry,) = json.loads((directory / "measured.json").read_text())
    assert entry["dense"]["token_ppl"] == dense["quality"]["token_ppl"]
    assert [row["token_ppl"] for row in entry["rows"]] == [
        own["quality"]["token_ppl"], level["quality"]["token_ppl"]
    ]  # fmt: skip
    assert entry["on"] == "corpus.txt" and entry["rows"][1]["skipped"] == level["skipped"]
    text = (directory / "README.md").read_text()
    assert "| dense model | " in text and "| at level 30% | " in text
    assert parsed(text).data.eval_results[0].metric_value == own["quality"]["token_ppl"]
    assert str(corpus.parent) not in text


def test_a_card_that_cannot_be_written_is_refused_first(
    cli: Any, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_llm_eval.compare.evaluate", None)  # nothing is measured
    directory = Path(shutil.copytree(pruned, tmp_path / "pruned"))
    (directory / "README.md").write_text("mine alone\n")
    for model, message in (
        (directory, "has no lines '<!-- prune-llm:figures -->'"),
        ("org/name", "update_card: 'org/name' is no local directory; download it first"),
    ):
        result = cli("eval", model, "--update-card")
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1
