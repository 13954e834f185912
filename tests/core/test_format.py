"""Packing and unpacking are exact inverses; a damaged packed weight is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune_llm import format as module
from prune_llm.format import (
    BITMASK,
    DTYPES,
    OFFSETS,
    PACKED,
    Header,
    check_headers,
    kept_per_row,
    pack,
    saves_space,
    unpack,
    validate,
)
from prune_llm.masks import Pattern, keep_mask
from prune_llm.sparse_format import SparseFormat

PATTERNS = ("0.5", "0.9", "2:4", "1:4", "4:8", "3:7", "15:16")


def pruned(rows: int, width: int, pattern: Pattern, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A random weight that fits ``pattern``; one in eight kept weights is zero itself."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    keep = keep_mask(weight.abs(), pattern)
    keep &= torch.rand(rows, width, generator=generator) > 0.125
    return (weight * keep).to(dtype) + 0.0


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    )


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    pattern=st.sampled_from(PATTERNS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_round_trip_is_exact(
    rows: int, width: int, pattern: str, dtype: torch.dtype, seed: int
) -> None:
    weight = pruned(rows, width, Pattern.parse(pattern), dtype, seed)
    parts = pack(weight, Pattern.parse(pattern))
    validate("w.weight", parts, width, Pattern.parse(pattern))
    assert same_bits(unpack(parts, width), weight)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "3:7"])
def test_many_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    weight = pruned(23, 37, Pattern.parse(pattern), torch.bfloat16)
    whole = pack(weight, Pattern.parse(pattern))
    monkeypatch.setattr(module, "CHUNK", 100)
    parts = pack(weight, Pattern.parse(pattern))
    assert all(torch.equal(parts[suffix], whole[suffix]) for suffix in whole)
    assert same_bits(unpack(parts, 37), weight)
    validate("w", parts, 37, Pattern.parse(pattern))


def test_written_out_by_hand() -> None:
    weight = torch.zeros(2, 10)
    weight[0, 0], weight[0, 9], weight[1, 3] = 1.0, 2.0, -3.0
    parts = pack(weight, Pattern.parse("0.8"))
    assert parts[BITMASK].tolist() == [[0b1, 0b10], [0b1000, 0]]
    assert parts[PACKED].tolist() == [1.0, 2.0, -3.0]
    assert parts[OFFSETS].tolist() == [0, 2, 3]
    assert (parts[BITMASK].dtype, parts[OFFSETS].dtype) == (torch.uint8, torch.int32)


def test_fixed_count_by_hand() -> None:
    """Zeros that count as kept are the leftmost of their group; the tail keeps ceil(N t / M)."""
    weight = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0, 7.0]])
    parts = pack(weight, Pattern.parse("2:4"))
    assert parts.keys() == {BITMASK, PACKED}
    assert parts[BITMASK].tolist() == [[0b100101]]
    assert parts[PACKED].tolist() == [[0.0, 5.0, 7.0]]
    assert kept_per_row(6, Pattern.parse("2:4")) == 3


def test_size_at_half_sparsity() -> None:
    """2 * density + 1/8 bytes a weight in bfloat16: 56 % of dense, and a few for the offsets."""
    weight = torch.ones(256, 512, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    nbytes = sum(part.nbytes for part in pack(weight, Pattern.parse("0.5")).values())
    assert nbytes == weight.nbytes // 2 + weight.numel() // 8 + 4 * 257


def test_dense_weight_does_not_save_space() -> None:
    weight = torch.ones(8, 64, dtype=torch.bfloat16)
    assert not saves_space(pack(weight, Pattern.parse("0.01")), weight)
    weight[:, ::4] = 0
    assert saves_space(pack(weight, Pattern.parse("0.25")), weight)


def test_offsets_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE_OFFSETS", 12)
    parts = pack(torch.eye(3, 4), Pattern.parse("0.5"))
    assert parts[OFFSETS].dtype == torch.int64
    assert torch.equal(unpack(parts, 4), torch.eye(3, 4))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 2, 2), "only matrices"),
        (torch.zeros(2, 2, dtype=torch.float64), "float64"),
        (torch.tensor([[1.0, torch.nan]]), "NaN or infinite"),
        (torch.tensor([[1.0, -torch.inf]], dtype=torch.float16), "NaN or infinite"),
        (torch.tensor([[1.0, -0.0]], dtype=torch.bfloat16), r"-0\.0"),
        (torch.ones(2, 4), "2:4 allows 2"),
        (torch.tensor([[1.0, 0, 0, 0, 1.0, 1.0]]), "a group of 2 inputs"),
    ],
)
def test_refuses_what_it_cannot_pack(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"h\.up\.weight: .*{message}"):
        pack(weight, Pattern.parse("2:4"), "h.up.weight")


def damaged(how: str) -> tuple[dict[str, Tensor], Pattern]:
    pattern = Pattern.parse("2:4" if "group" in how else "0.5")
    parts = {k: v.clone() for k, v in pack(pruned(4, 13, pattern, torch.bfloat16), pattern).items()}
    if how == "padding":
        parts[BITMASK][1, 1] |= 0b1000_0000
    elif how == "mask bit":
        parts[BITMASK][2, 0] ^= 1
    elif how == "group moved":
        row = parts[BITMASK][0]
        row[0] = 0b0000_1111  # the count of the row is right, those of its groups are not
    elif how == "offsets order":
        parts[OFFSETS][1] = -5
    elif how == "offsets end":
        parts[OFFSETS][-1] += 1
    elif how == "truncated":
        parts[PACKED] = parts[PACKED][:-1]
    elif how == "nan":
        parts[PACKED][3] = torch.nan
    elif how == "negative zero":
        parts[PACKED][0] = -0.0
    elif how == "missing":
        del parts[PACKED]
    elif how == "no offsets":
        del parts[OFFSETS]
    elif how == "mask dtype":
        parts[BITMASK] = parts[BITMASK].to(torch.int8)
    elif how == "offsets dtype":
        parts[OFFSETS] = parts[OFFSETS].long()
    elif how == "offsets short":
        parts[OFFSETS] = parts[OFFSETS][:-1]
    elif how == "mask wide":
        parts[BITMASK] = torch.cat([parts[BITMASK]] * 2, dim=1)
    elif how == "group short":
        parts[PACKED] = parts[PACKED][:, :-1]
    return parts, pattern


@pytest.mark.parametrize(
    ("how", "tensor"),
    [
        ("padding", "weight_bitmask"),
        ("mask bit", "weight_offsets"),
        ("group moved", "weight_bitmask"),
        ("offsets order", "weight_offsets"),
        ("offsets end", "weight_offsets"),
        ("truncated", "weight_offsets"),
        ("nan", "weight_packed"),
        ("negative zero", "weight_packed"),
        ("missing", "weight_packed"),
        ("no offsets", "weight_offsets"),
        ("mask dtype", "weight_bitmask"),
        ("offsets dtype", "weight_offsets"),
        ("offsets short", "weight_offsets"),
        ("mask wide", "weight_bitmask"),
        ("group short", "weight_packed"),
    ],
)
def test_damage_is_named(how: str, tensor: str) -> None:
    parts, pattern = damaged(how)
    with pytest.raises(ValueError, match=rf"h\.up\.{tensor}: "):
        validate("h.up.weight", parts, 13, pattern)


def test_headers_tell_bounds_before_anything_is_read() -> None:
    headers = {
        BITMASK: Header(torch.uint8, (1, 1)),
        PACKED: Header(torch.bfloat16, (9,)),
        OFFSETS: Header(torch.int32, (2,)),
    }
    with pytest.raises(ValueError, match="w_packed: holds 9 values, its weight has 8"):
        check_headers("w", headers, None, Pattern.parse("0.5"))


def test_settings_round_trip() -> None:
    form = SparseFormat("2:4", ignore=("lm_head",), in_features={"a.weight": 13})
    assert SparseFormat.parse(form.to_json() | {"a later key": 1}) == form
    plain = SparseFormat("0.5").to_json()
    assert plain.keys() == {"quant_method", "format_version", "pattern", "ignore"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2: .*reads version 1; install a newer"),
        ({"format_version": None}, "format_version None"),
        ({"pattern": "x"}, "pattern 'x'"),
        ({"pattern": 3}, "pattern is 3"),
        ({"in_features": {"a": -1}}, "in_features of 'a'"),
        ({"in_features": [1]}, "in_features is"),
        ({"ignore": "lm_head"}, "ignore is"),
        ({"quant_method": "gptq"}, "must be 'prune_llm'"),
    ],
)
def test_refuses_other_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFormat.parse(SparseFormat("0.5").to_json() | change)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseFormat("0.5").pattern = "0.6"  # type: ignore[misc]
