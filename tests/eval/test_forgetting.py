"""Where models differ most, against plain float64 loops over their logits; and its printing."""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import llama_config, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_llm import PruneConfig, prune
from prune_llm.activation.sparsify import SparsifyConfig, sparsify
from prune_llm.calibration import load_tokenizer
from prune_llm.cli_forgotten import flips, marked, print_forgotten, visible
from prune_llm.vocabulary import Vocabulary
from prune_llm_eval.compare import EvalConfig, ModelQuality, evaluate
from prune_llm_eval.forgetting import (
    Choice,
    Difference,
    Forgotten,
    Passage,
    PassageToken,
    by_frequency,
    by_position,
    concentration,
    forgotten,
    worst_passages,
)
from prune_llm_eval.perplexity import Quality, TokenScores, quality, score_tokens

WINDOWS, T = 6, 80
# of the byte tokenizer: <s>, </s>, then the bytes in the order of their letters
LETTER = {chr(byte): byte - 0x21 + 2 for byte in range(0x21, 0x7F)}


@pytest.fixture(scope="module")
def vocabulary(tiny_llama: Path) -> Vocabulary:
    return Vocabulary(load_tokenizer(tiny_llama))


@pytest.fixture(scope="module")
def pair(tiny_llama: Path) -> list[Any]:
    """The dense model and a perturbed one."""
    models = [AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return models


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Few tokens are frequent, many come once."""
    generator = torch.Generator().manual_seed(0)
    return (80 * torch.rand(WINDOWS, T, generator=generator) ** 2.5).long()


@pytest.fixture(scope="module")
def scores(pair: list[Any], windows: Tensor) -> list[TokenScores]:
    return score_tokens(pair, windows, against_first=True)


@pytest.fixture(scope="module")
def plain(pair: list[Any], windows: Tensor) -> list[dict[str, Any]]:
    """One record for each predicted token, from the models in float64."""
    records = []
    with torch.no_grad():
        dense, other = (m.double()(windows).logits.log_softmax(-1) for m in pair)
    for model in pair:
        model.float()
    for window in range(WINDOWS):
        for place in range(1, T):
            p, q = (logs[window, place - 1].tolist() for logs in (dense, other))
            target = int(windows[window, place])
            records.append(
                {
                    "window": window,
                    "place": place,
                    "target": target,
                    "kl": math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)),
                    "dense": p.index(max(p)),
                    "model": q.index(max(q)),
                    "confidence": math.exp(max(q)),
                    "increase": p[target] - q[target],
                    "nll": -q[target],
                }
            )
    return records


@pytest.fixture(scope="module")
def found(scores: list[TokenScores], windows: Tensor, vocabulary: Vocabulary) -> Forgotten:
    return forgotten(*scores, windows, vocabulary, 4)


def means(records: list[dict[str, Any]]) -> tuple[int, float, float, float]:
    return (
        len(records),
        statistics.fmean(r["kl"] for r in records),
        statistics.fmean(r["dense"] != r["model"] for r in records),
        statistics.fmean(r["increase"] for r in records),
    )


def harm(value: Any) -> Any:
    got = (value.tokens, value.kl, value.flips, value.nll_increase)
    return pytest.approx(got, rel=1e-4, abs=1e-5)


def test_every_token(scores: list[TokenScores], plain: list[dict[str, Any]]) -> None:
    own = scores[1]
    assert own.kl_SP is not None and own.flipped_SP is not None
    assert own.nll_SP.shape == (WINDOWS, T - 1)
    near = {"rel": 1e-4, "abs": 1e-5}
    assert own.kl_SP.flatten().tolist() == pytest.approx([r["kl"] for r in plain], **near)
    assert own.nll_SP.flatten().tolist() == pytest.approx([r["nll"] for r in plain], **near)
    assert own.choice_SP.flatten().tolist() == [r["model"] for r in plain]
    confidence = [r["confidence"] for r in plain]
    assert own.confidence_SP.flatten().tolist() == pytest.approx(confidence, **near)
    assert own.flipped_SP.flatten().tolist() == [r["dense"] != r["model"] for r in plain]
    assert 0.1 < own.flipped_SP.double().mean() < 0.9  # the models differ here and there
    assert scores[0].kl_SP is None and scores[0].flipped_SP is None


def test_the_whole(found: Forgotten, plain: list[dict[str, Any]]) -> None:
    assert harm(found) == means(plain)
    count = len(plain)
    increases = [r["increase"] for r in plain]
    right = [(r["dense"] == r["target"], r["model"] == r["target"]) for r in plain]
    assert found.lost == right.count((True, False)) / count > 0
    assert found.gained == right.count((False, True)) / count > 0
    assert found.clearly_worse == sum(x > 1 for x in increases) / count > 0
    assert found.clearly_better == sum(x < -1 for x in increases) / count > 0
    worse = math.fsum(x for x in increases if x > 0) / count
    assert found.nll_of_worse == pytest.approx(worse, rel=1e-4)
    assert found.nll_of_worse + found.nll_of_better == pytest.approx(found.nll_increase, abs=1e-12)
    by_window = [statistics.fmean(increases[n : n + T - 1]) for n in range(0, count, T - 1)]
    stderr = statistics.stdev(by_window) / math.sqrt(WINDOWS)
    assert found.nll_increase_stderr == pytest.approx(stderr, rel=1e-4) and stderr > 0
    kls = sorted((r["kl"] for r in plain), reverse=True)
    assert found.kl_median == pytest.approx(statistics.median(kls), rel=1e-4)
    assert count == 474 and found.kl_of_worst_percent == pytest.approx(
        math.fsum(kls[:5]) / math.fsum(kls), rel=1e-4
    )


def test_right_answers_lost_and_gained(vocabulary: Vocabulary) -> None:
    """Of five flips three lose a right answer, one finds one, one goes from wrong to wrong."""
    zeros = torch.zeros(1, 5)
    dense = TokenScores(zeros, torch.tensor([[1, 2, 3, 9, 9]]).int(), zeros)
    model = TokenScores(
        zeros, torch.tensor([[7, 7, 7, 4, 8]]).int(), zeros, zeros, torch.ones(1, 5) == 1
    )
    found = forgotten(dense, model, torch.tensor([[0, 1, 2, 3, 4, 5]]), vocabulary, 1)
    assert (found.flips, found.lost, found.gained) == (1.0, 0.6, 0.2)
    assert "nothing differs" not in printed(found)


def test_by_position(found: Forgotten, plain: list[dict[str, Any]]) -> None:
    bounds = [(b.low, b.high) for b in found.by_position]
    assert bounds == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 79)]
    for bucket in found.by_position:
        inside = [r for r in plain if bucket.low <= r["place"] <= bucket.high]
        assert harm(bucket) == means(inside)


def test_by_frequency(found: Forgotten, plain: list[dict[str, Any]]) -> None:
    """Counts from the largest down; a group ends behind 50, 80, 95 % of the text."""
    seen = Counter(r["target"] for r in plain)
    groups: list[list[int]] = [[], [], [], []]
    before = 0
    for times in sorted(set(seen.values()), reverse=True):
        share = 100 * before / len(plain)
        groups[sum(share >= end for end in (50, 80, 95))].append(times)
        before += times * list(seen.values()).count(times)
    expected = [group for group in groups if group]
    assert [(b.high, b.low) for b in found.by_frequency] == [(g[0], g[-1]) for g in expected]
    assert len(expected) >= 3
    for bucket in found.by_frequency:
        inside = [r for r in plain if bucket.low <= seen[r["target"]] <= bucket.high]
        assert harm(bucket) == means(inside)


def test_buckets_sum_to_the_whole(found: Forgotten, scores: list[TokenScores]) -> None:
    whole = quality(scores[1], T)
    for buckets in (found.by_position, found.by_frequency):
        assert sum(b.tokens for b in buckets) == whole.tokens
        for name, mean in (("kl", whole.kl), ("flips", whole.flips)):
            total = math.fsum(b.tokens * getattr(b, name) for b in buckets)
            assert total / whole.tokens == pytest.approx(mean, rel=1e-12)
    assert (found.tokens, found.flips) == (whole.tokens, whole.flips)
    assert found.kl == pytest.approx(whole.kl, rel=1e-12)
    assert found.nll_increase == pytest.approx(whole.nll - quality(scores[0], T).nll, rel=1e-9)


def test_hurt_tokens(found: Forgotten, plain: list[dict[str, Any]]) -> None:
    seen = Counter(r["target"] for r in plain)
    by_token = {
        token: means([r for r in plain if r["target"] == token])
        for token, times in seen.items()
        if times >= 10
    }
    worse = {token: values for token, values in by_token.items() if values[3] > 0}
    order = sorted(worse, key=lambda token: -worse[token][3])
    assert 2 < len(order) < len(by_token)
    assert [hurt.token for hurt in found.hurt] == order[:20]
    for hurt in found.hurt:
        assert harm(hurt) == worse[hurt.token]


def test_worst_passages(found: Forgotten, plain: list[dict[str, Any]], windows: Tensor) -> None:
    sums: dict[tuple[int, int], float] = {}
    for r in plain:
        key = (r["window"], 1 + (r["place"] - 1) // 32 * 32)
        sums[key] = sums.get(key, 0) + r["kl"]
    order = sorted(sums, key=lambda key: -sums[key])
    assert [(p.window, p.start) for p in found.passages] == order[:4]
    everything = {(r["window"], r["place"]): r for r in plain}
    for passage in found.passages:
        inside = [
            everything[passage.window, place]
            for place in range(passage.start, min(T, passage.start + 32))
        ]
        assert harm(passage) == means(inside) and len(passage.pieces) == len(inside)
        for piece, r in zip(passage.pieces, inside, strict=True):
            assert piece.token == r["target"]
            assert (piece.dense_choice.token, piece.choice.token) == (r["dense"], r["model"])
            assert piece.flipped == (r["dense"] != r["model"])
            assert piece.kl == pytest.approx(r["kl"], rel=1e-4, abs=1e-5)
            assert piece.probability == pytest.approx(math.exp(-r["nll"]), rel=1e-4)
            both = math.exp(r["increase"] - r["nll"])
            assert piece.dense_probability == pytest.approx(both, rel=1e-4)
            assert piece.choice.probability == pytest.approx(r["confidence"], rel=1e-4)


def test_more_passages_than_there_are(
    scores: list[TokenScores], windows: Tensor, vocabulary: Vocabulary
) -> None:
    every = forgotten(*scores, windows, vocabulary, 1000).passages
    assert len(every) == WINDOWS * 3 and sum(p.tokens for p in every) == WINDOWS * (T - 1)
    assert forgotten(*scores, windows, vocabulary, 0).passages == ()


def planted(pair: list[Any], windows: Tensor, damage: Callable[[Any], None]) -> list[TokenScores]:
    """The dense model beside a copy that was damaged."""
    damaged = type(pair[0])(pair[0].config).eval()
    damaged.load_state_dict(pair[0].state_dict())
    with torch.no_grad():
        damage(damaged)
    return score_tokens([pair[0], damaged], windows, against_first=True)


def test_the_token_whose_row_is_lost_is_hurt_most(
    pair: list[Any], windows: Tensor, vocabulary: Vocabulary
) -> None:
    token = LETTER["k"]
    text = windows.clone()
    text[:, 10::15] = token

    with torch.no_grad():
        mean = pair[0].model(text).last_hidden_state.mean((0, 1))

    def forget(model: Any) -> None:
        model.lm_head.weight[token] -= 10 * mean / mean.norm() ** 2

    found = forgotten(*planted(pair, text, forget), text, vocabulary, 1)
    assert (found.hurt[0].token, found.hurt[0].text) == (token, "k")
    assert found.hurt[0].nll_increase > 1
    assert all(hurt.nll_increase < 0.1 for hurt in found.hurt[1:])


def test_the_passage_where_harm_lies_is_the_worst(pair: list[Any], vocabulary: Vocabulary) -> None:
    """One token, read once, whose embedding was blown up: nothing in front of it may differ."""
    token = LETTER["~"]
    text = torch.randint(2, 60, (WINDOWS, T), generator=torch.Generator().manual_seed(3))
    text[4, 40] = token

    def damage(model: Any) -> None:
        model.model.embed_tokens.weight[token] += 3 * torch.randn(
            64, generator=torch.Generator().manual_seed(0)
        )

    found = forgotten(*planted(pair, text, damage), text, vocabulary, 100)
    assert (found.passages[0].window, found.passages[0].start) == (4, 33)
    assert {p.window for p in found.passages} == {4} and len(found.passages) == 2
    kls = [piece.kl for piece in found.passages[0].pieces]
    assert kls[:8] == [0] * 8 and min(kls[8:]) > 0  # token 41 is the first that is predicted by it
    assert found.passages[0].text[7] == "~" and len(found.passages[0].before) == 16


def test_models_that_do_not_differ(
    pair: list[Any], windows: Tensor, vocabulary: Vocabulary
) -> None:
    found = forgotten(*planted(pair, windows, lambda _: None), windows, vocabulary, 5)
    values = asdict(found)
    assert values.pop("kl_of_worst_percent") is None
    assert (values.pop("hurt"), values.pop("passages"), values.pop("tokens")) == ((), (), 474)
    for bucket in (*values.pop("by_position"), *values.pop("by_frequency")):
        assert (bucket["kl"], bucket["flips"], bucket["nll_increase"]) == (0, 0, 0)
    assert set(values.values()) == {0.0}
    assert printed(found).splitlines()[-1] == (
        "nothing differs: the models predict the same at every token"
    )


@pytest.mark.parametrize("context", [1, 40])
def test_context_moves_positions(
    pair: list[Any], windows: Tensor, vocabulary: Vocabulary, context: int
) -> None:
    """What is read and not scored is part of the position, and in front of passages."""
    own = score_tokens(pair, windows, against_first=True, context=context)
    found = forgotten(*own, windows, vocabulary, 1000)
    assert found.by_position[0].low == context and found.by_position[-1].high == T - 1
    assert found.tokens == WINDOWS * (T - context)
    assert min(p.start for p in found.passages) == context
    for p in found.passages:
        assert [t.token for t in p.pieces] == windows[p.window, p.start : p.start + 32].tolist()


def test_windows_of_two_tokens(pair: list[Any], windows: Tensor, vocabulary: Vocabulary) -> None:
    short = windows.reshape(-1, 2)
    found = forgotten(*score_tokens(pair, short, against_first=True), short, vocabulary, 3)
    assert [(b.low, b.high, b.tokens) for b in found.by_position] == [(1, 1, len(short))]
    assert [(p.start, p.tokens) for p in found.passages] == [(1, 1)] * 3
    assert printed(found).count("tokens 1 to 1") == 3


def test_pure_parts() -> None:
    kl = torch.zeros(3, 70, dtype=torch.float64)
    kl[1, 69], kl[2, 0], kl[0, 33] = 5, 3, 4
    kl[0, 0] = -1e-9  # rounding
    assert worst_passages(kl, 9) == [(1, 64), (0, 32), (2, 0)]
    assert worst_passages(kl, 1) == [(1, 64)]
    kl[2, 69] = math.nan
    assert worst_passages(kl, 1) == [(2, 64)]
    assert concentration(torch.tensor([1.0, 0.0, 3.0, 0.0])) == (0.5, 0.75)
    assert concentration(torch.zeros(3)) == (0.0, None)
    # 101 tokens: the worst 1 % are two
    assert concentration(torch.tensor([2.0, 2.0, *[0.0] * 98, 4.0]))[1] == 0.75


def test_tokens_of_equal_frequency_share_a_group() -> None:
    """10 x a, 4 x b, 4 x c, 1 x d, 1 x e: a is half, b and c go on to 90 %, d and e end it."""
    targets = torch.tensor([[0] * 10 + [1] * 4 + [2] * 4 + [3, 4]])
    even = Difference(torch.ones(1, 20), torch.zeros(1, 20) == 1, torch.ones(1, 20))
    buckets = by_frequency(even, targets)
    assert [(b.low, b.high, b.tokens) for b in buckets] == [(10, 10, 10), (4, 4, 8), (1, 1, 2)]
    assert [(b.low, b.high) for b in by_position(even, 5)] == [(5, 7), (8, 15), (16, 24)]


def printed(found: Forgotten, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    row = ModelQuality("[red]pruned[/]", Quality(1, 1, 1, 1, 1, 2), 0, 0, forgotten=found)
    print_forgotten(console, row, replace(row, name="dense", forgotten=None))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_text_is_safe_on_a_terminal(
    scores: list[TokenScores], windows: Tensor, vocabulary: Vocabulary
) -> None:
    r"""[bold], escape sequences, newlines and direction marks are shown, not obeyed."""
    text = "[/] :smile: \x1b[31m \n\r\x00 \u202e \ud800 \\ é"
    assert visible(text) == r"[/] :smile: \x1b[31m \n\r\x00 \u202e \ud800 \ é"
    choice = Choice(1, "[b]\x1b", 0.5)
    piece = PassageToken(1, text, 1.0, True, 0.1, 0.9, choice, choice)
    passage = Passage(1, 1.0, 1.0, 1.0, 0, 1, "[i]\x07", text, (piece,))
    found = replace(forgotten(*scores, windows, vocabulary, 0), passages=(passage,))
    output = printed(found, width=200)
    assert f"…[i]\\x07‹{visible(text)}›" in output
    assert '…[i]\\x07‹?›  dense: "[b]\\x1b" 50%, now: "[b]\\x1b" 50%' in output
    assert "what [red]pruned[/] forgot of dense" in output
    assert all(c.isprintable() or c == "\n" for c in output)
    # packed kernels add in another order: what is zero but for rounding is no harm to look at
    rounding = replace(found, passages=(replace(passage, kl=0.004),))
    assert "window 0" in output and "window 0" not in printed(rounding)


def piece(text: str, flipped: bool, kl: float = 0.0) -> PassageToken:
    choices = Choice(7, " new", 0.25), Choice(8, " old", 0.75)
    return PassageToken(0, text, kl, flipped, 0.1, 0.9, *choices)


def test_marks() -> None:
    pieces = (
        piece(" the", False),
        piece(" b", True, 0.5),
        piece("ig", True, 2.0),
        piece(" caf", False),
        piece("", True, 1.0),  # the first half of é
        piece("é", False),
        piece(" ", True),
        piece(".", False),
    )
    passage = Passage(len(pieces), 1.0, 1.0, 1.0, 0, 1, "at", " the big café .", pieces)
    assert marked(passage).plain == "…at the ‹big› caf‹é ›."
    assert [line.plain for line in flips(passage)] == [
        '…at the b‹?›  dense: " old" 75%, now: " new" 25%',
        '…at the big caf‹?›  dense: " old" 75%, now: " new" 25%',
    ]


def test_characters_of_several_tokens(pair: list[Any], tiny_llama: Path) -> None:
    """é is two tokens here, and the second passage begins inside of one."""
    tokenizer = load_tokenizer(tiny_llama)
    part = "é a\x07 "
    ids = tokenizer("é" + 11 * part, add_special_tokens=False).input_ids
    windows = torch.tensor([ids[:65]])
    own = score_tokens(pair, windows, against_first=True)
    passages = forgotten(*own, windows, Vocabulary(tokenizer), 9).passages
    for passage in passages:
        assert "".join(piece.text for piece in passage.pieces) == passage.text
    # the first half of a character that the second passage completes is nowhere, or in the first
    first, second = sorted(passages, key=lambda passage: passage.start)
    assert (first.before, first.text) == ("", "é" + 5 * part + "\ufffd")
    assert (second.before, second.text) == ("a\x07 " + 2 * part, 5 * part + "é ")


def test_evaluate_every_row(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    """The pruned model and a level of it are each compared with the dense one."""
    prune(tiny_llama, PruneConfig(method="magnitude"), tmp_path / "pruned")
    given: Any = {"calibration": str(corpus), "seq_len": 32, "samples": 8, "device": "cpu"}
    levels = SparsifyConfig(allocation="uniform", activation_sparsity=(0.4,), **given)
    sparsify(tmp_path / "pruned", levels, tmp_path / "out")
    config = EvalConfig(
        text=str(corpus), seq_len=64, windows=4, device="cpu", levels=("40%",), passages=2
    )
    dense, pruned, level = evaluate(str(tmp_path / "out"), str(tiny_llama), config, lambda *_: None)
    assert dense.forgotten is None
    for row in (pruned, level):
        assert row.forgotten is not None and len(row.forgotten.passages) == 2
        assert row.forgotten.flips == row.quality.flips
        assert row.forgotten.kl == pytest.approx(row.quality.kl, rel=1e-12)
    assert level.quality.kl != pruned.quality.kl


def test_command(
    cli: Callable[..., Any], tiny_llama: Path, corpus: Path, tmp_path: Path, pair: list[Any]
) -> None:
    save_model(tmp_path / "model", llama_config())
    pair[1].save_pretrained(tmp_path / "model")
    out = tmp_path / "quality.json"
    common = ["--text", corpus, "--seq-len", 64, "--json", out]
    compared = [*common, "--against", tiny_llama]
    result = cli("eval", tmp_path / "model", *compared, "--windows", 3, "--passages", 1)
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())
    keys = {"token_ppl", "nll", "nll_stderr", "tokens", "windows", "seq_len", "kl", "flips"}
    assert [set(row["quality"]) for row in rows] == [keys] * 2
    assert rows[0]["forgotten"] is None
    found = rows[1]["forgotten"]
    assert len(found["passages"]) == 1 and found["flips"] == rows[1]["quality"]["flips"]
    (passage,) = found["passages"]
    assert "".join(p["text"] for p in passage["pieces"]) == passage["text"]
    assert f"{found['lost']:.2%} of the tokens were right" in result.output
    last = found["by_position"][-1]
    assert (last["low"], last["high"], last["tokens"]) == (32, 63, 96)
    assert re.search(rf"behind 32-63 +96 +{last['kl']:.4f} ", result.output)
    assert "1. window " in result.output and "2. window " not in result.output
    # one window has no standard error, and JSON no nan
    alone = cli("eval", tiny_llama, *common, "--windows", 1)
    assert alone.exit_code == 0 and "forgot" not in alone.output
    (row,) = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["quality"]["nll_stderr"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "MODEL", "--passages", "-1"], "passages -1: must be at least 0"),
        (["--passages", "3"], "--passages needs --against or --level"),
        (["--tasks", "x", "--passages", "3"], "--passages does not go with --tasks"),
    ],
)
def test_bad_values(
    cli: Callable[..., Any], tiny_llama: Path, arguments: list[str], message: str
) -> None:
    result = cli("eval", tiny_llama, *(tiny_llama if a == "MODEL" else a for a in arguments))
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
