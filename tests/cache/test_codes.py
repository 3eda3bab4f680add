"""Codes and back: packing beside its inverse, and errors within half a step."""

from __future__ import annotations

import pytest
import torch

from longspec.cache.codes import Codec, DualCodec, pack, unpack
from longspec.cache.stage import BLOCK, Shape

SHAPE = Shape(3, 24, (None,), torch.float32, torch.device("cpu"))
CODECS = [Codec(8, symmetric=True), Codec(8), Codec(4), Codec(2), DualCodec()]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [8, 24, 64])
def test_unpack_is_the_inverse_of_pack(bits: int, size: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, size), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, size * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_decoded_values_are_within_half_a_step(codec: Codec) -> None:
    """Of the stored step, and what fp16 takes off the step and the low end (2^-11 of the range)."""
    rows = torch.randn(2, 3, 5, BLOCK, 24) * torch.logspace(-2, 2, 24) + torch.linspace(-3, 9, 24)
    keys, values = codec.decode(codec.encode(rows[0], rows[1]), torch.float32)
    levels = 127 if codec.symmetric else (1 << codec.bits) - 1
    for got, want, axis in ((keys, rows[0], -2), (values, rows[1], -1)):
        reach = (
            want.abs().amax(axis, keepdim=True) if codec.symmetric else want.amax(axis, True) - want.amin(axis, True)
        )
        largest = want.abs().amax(axis, keepdim=True)
        error = (got.view(want.shape) - want).abs()
        assert (error <= reach / levels / 2 + (reach + largest) * 2.0**-10).all()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_flat_and_huge_rows_stay_finite(codec: Codec) -> None:
    for value in (0.0, 1e-9, 3.0, 1e6, -1e6):
        rows = torch.full((3, 1, BLOCK, 24), value)
        keys, _ = codec.decode(codec.encode(rows, rows), torch.float32)
        assert keys.isfinite().all()
        assert (keys - value).abs().max() <= max(abs(value) * 0.01, 1e-6) or abs(value) > 65504


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_room_is_what_codes_need(codec: Codec) -> None:
    rows = torch.randn(3, 7, BLOCK, 24)
    for room, codes in zip(codec.empty(SHAPE, 7), codec.encode(rows, rows), strict=True):
        assert room.shape == codes.shape
        assert room.dtype == codes.dtype


def test_the_upper_plane_is_the_codes_to_four_bits() -> None:
    codec = DualCodec()
    rows = torch.randn(3, 2, BLOCK, 24)
    codes = codec.encode(rows, rows)
    upper, plane = codec.upper(codes)
    for full, part, axis in zip(
        codec.decode(codes, torch.float32), upper.decode(plane, torch.float32), (-2, -1), strict=True
    ):
        step = (rows.amax(axis, keepdim=True) - rows.amin(axis, keepdim=True)) / 255
        assert ((full - part).view(rows.shape).abs() <= 8.5 * step + 0.01).all()
    assert plane[0].data_ptr() == codes[0].data_ptr()
