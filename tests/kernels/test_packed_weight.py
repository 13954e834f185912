"""Nothing that could make a kernel read outside its buffers becomes a PackedWeight."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_llm_kernels import PackedWeight, cpu, dispatch, reference

BACKENDS = [cpu, reference]


def pack(O: int = 6, I: int = 13) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(O, I, generator=generator) < 0.5
    keep[0, :2] = torch.tensor([True, False])
    return reference.pack(keep.to(torch.bfloat16))


def test_pack_is_the_inverse_of_unpack() -> None:
    for O, I in [(1, 1), (5, 8), (3, 17), (0, 4), (4, 100)]:
        weight = torch.randn(O, I) * (torch.rand(O, I) < 0.5)
        packed = reference.pack(weight)
        assert torch.equal(
            reference.unpack(packed.bitmask, packed.packed, packed.offsets, I), weight
        )


def test_layout_is_the_documented_one() -> None:
    weight = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0, 7.0], [5, 0, 6, 0, 0, 0, 0, 0, 0, 0]])
    packed = reference.pack(weight)
    assert packed.bitmask.tolist() == [[0, 2], [5, 0]]
    assert packed.packed.tolist() == [7, 5, 6]
    assert packed.offsets is not None and packed.offsets.dtype == torch.int32
    assert packed.offsets.tolist() == [0, 1, 3]
    assert (packed.out_features, packed.in_features, packed.nbytes) == (2, 10, 4 + 12 + 12)


def test_fixed_count_needs_equal_rows() -> None:
    with pytest.raises(ValueError, match="same number of kept"):
        reference.pack(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), fixed_count=True)


Damage = Callable[[PackedWeight], dict[str, object]]
FORMS: dict[str, tuple[Damage, str]] = {
    "in_features": (lambda w: {"in_features": 0}, "in_features is 0"),
    "mask width": (lambda w: {"in_features": 17}, r"weight_bitmask .* need 3 bytes"),
    "mask dtype": (lambda w: {"bitmask": w.bitmask.int()}, "weight_bitmask has dtype torch.int32"),
    "mask rank": (lambda w: {"bitmask": w.bitmask.flatten()}, "weight_bitmask .* 2 dimensions"),
    "mask stride": (
        lambda w: {"bitmask": w.bitmask.t().contiguous().t()},
        "weight_bitmask is not contiguous",
    ),
    "value dtype": (lambda w: {"packed": w.packed.double()}, "weight_packed has dtype"),
    "value rank": (lambda w: {"packed": w.packed[None]}, "weight_packed .* 1 dimensions"),
    "value stride": (lambda w: {"packed": w.packed.repeat(2)[::2]}, "weight_packed is not contig"),
    "value alignment": (
        lambda w: {"packed": w.packed.float().repeat(2).view(torch.uint8)[1:-3].view(torch.uint8)},
        "weight_packed",
    ),
    "offset dtype": (lambda w: {"offsets": w.offsets.float()}, "weight_offsets has dtype"),  # type: ignore[union-attr]
    "offset count": (lambda w: {"offsets": w.offsets[:-1]}, "weight_offsets has 6 entries"),  # type: ignore[index]
    "no offsets": (lambda w: {"offsets": None}, "weight_packed .* 2 dimensions"),
    "too many per row": (
        lambda w: {"offsets": None, "packed": torch.ones(6, 14)},
        r"weight_packed .*\[6, K\] with K at most 13",
    ),
    "device": (lambda w: {"offsets": w.offsets.to("meta")}, "weight_offsets is on meta"),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("case", FORMS)
def test_wrong_form(case: str) -> None:
    good = pack()
    damage, message = FORMS[case]
    with pytest.raises(ValueError, match=message):
        replace(good, **damage(good))  # type: ignore[arg-type]


def test_misaligned_values() -> None:
    good = pack()
    memory = torch.zeros(good.packed.nbytes + 1, dtype=torch.uint8)
    misaligned = torch.tensor([], dtype=torch.bfloat16)
    with pytest.raises((ValueError, RuntimeError)):
        misaligned = memory[1:].view(torch.bfloat16)
        replace(good, packed=misaligned)


def offsets_with(row: int, value: int) -> Damage:
    def damage(weight: PackedWeight) -> dict[str, object]:
        assert weight.offsets is not None
        offsets = weight.offsets.clone()
        offsets[row] = value
        return {"offsets": offsets}

    return damage


def mask_with(row: int, byte: int, bits: int) -> Damage:
    def damage(weight: PackedWeight) -> dict[str, object]:
        bitmask = weight.bitmask.clone()
        bitmask[row, byte] ^= bits
        return {"bitmask": bitmask}

    return damage


CONTENTS: dict[str, tuple[Damage, str]] = {
    "start": (offsets_with(0, 1), r"weight_offsets\[0\] is 1; it must be 0"),
    "negative": (offsets_with(2, -5), r"weight_offsets\[2\] is -5; it must lie between"),
    "beyond": (offsets_with(3, 2**31 - 1), r"weight_offsets\[3\] is 2147483647; it must lie"),
    "not the end": (
        lambda w: {"packed": torch.cat([w.packed, w.packed[:1]])},
        r"weight_offsets\[6\] is \d+; it must be the \d+ values",
    ),
    "shifted": (offsets_with(1, 0), r"weight_bitmask row 0 keeps \d+ weights; packed has 0"),
    "one bit more": (mask_with(0, 0, 2), r"weight_bitmask row 0 keeps"),
    "padding": (mask_with(4, 1, 0x80), r"weight_bitmask row 4 has a padding bit .* column 12"),
}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda module: module.__name__.split(".")[-1])
@pytest.mark.parametrize("case", CONTENTS)
def test_wrong_contents(case: str, backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    good = pack()
    damage, message = CONTENTS[case]
    monkeypatch.setattr("prune_llm_kernels.packed_weight.backend_for", lambda device_type: backend)
    with pytest.raises(ValueError, match=message):
        replace(good, **damage(good))  # type: ignore[arg-type]


def test_error_names_the_weight() -> None:
    good = pack()
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight_offsets\[0\]"):
        replace(good, name="model.layers.0.mlp.up_proj.weight", **offsets_with(0, 1)(good))  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzzed_contents_are_refused_or_harmless(data: st.DataObject) -> None:
    """Random bytes for mask and offsets: both backends agree, and what passes multiplies."""
    O, I = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))
    B = (I + 7) // 8
    if data.draw(st.booleans()):
        bitmask = reference.pack((torch.rand(O, I) < 0.5).float()).bitmask
    else:
        bitmask = torch.randint(0, 256, (O, B), dtype=torch.uint8)
    counts = reference.keep_mask(bitmask, 8 * B).sum(1)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    for _ in range(data.draw(st.integers(0, 2))):
        offsets[data.draw(st.integers(0, O))] = data.draw(st.integers(-(2**40), 2**40))
    nnz = data.draw(st.integers(0, 8 * B * O))
    packed = torch.randn(int(offsets[-1]) if 0 <= int(offsets[-1]) < 10**4 else nnz)

    accepted = []
    for backend in BACKENDS:
        try:
            backend.check_contents(bitmask, packed, offsets, I)
            accepted.append(True)
        except ValueError:
            accepted.append(False)
    assert accepted[0] == accepted[1]
    if accepted[0]:
        x = torch.randn(2, I)
        expected = reference.sparse_linear(x, bitmask, packed, offsets, None)
        found = cpu.sparse_linear(x, bitmask, packed, offsets, None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_unknown_device_is_refused() -> None:
    dispatch.backend_for.cache_clear()
    with pytest.raises(ValueError, match="no kernel for device 'meta'"):
        PackedWeight(
            torch.zeros(2, 1, dtype=torch.uint8, device="meta"),
            torch.zeros(0, device="meta"),
            torch.zeros(3, dtype=torch.int32, device="meta"),
            8,
        )


def test_settling_keeps_content_and_address() -> None:
    tensor = torch.arange(3 * 2**20, dtype=torch.int32)
    before, address = tensor.clone(), tensor.data_ptr()
    cpu.settle(tensor)
    assert torch.equal(tensor, before) and tensor.data_ptr() == address
