# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Codes to numbers and back: properties, and values worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nemo_ptq.verify import dequantize as dq

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda half: (2 * half[0], 2 * half[1]))
FLOATS = st.floats(-1e4, 1e4, width=32)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy())


@settings(deadline=None)
@given(arrays(np.int8, SHAPES, elements=st.integers(-8, 7)))
def test_int4_survives_packing_row_by_row(codes: np.ndarray) -> None:
    packed = np.empty((codes.shape[0] // 2, codes.shape[1]), np.int8)
    for row, column in np.ndindex(packed.shape):
        low, high = int(codes[2 * row, column]) % 16, int(codes[2 * row + 1, column]) % 16
        packed[row, column] = np.array(low + 16 * high, np.uint8).astype(np.int8)
    unpacked = dq.unpack_int4(as_tensor(packed))
    assert unpacked.dtype == torch.int8
    assert np.array_equal(unpacked.numpy(), codes)


@settings(deadline=None)
@given(arrays(np.uint8, SHAPES, elements=st.integers(0, 15)))
def test_e2m1_survives_packing_column_by_column(codes: np.ndarray) -> None:
    packed = (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)
    found = dq.unpack_e2m1(as_tensor(packed)).numpy()
    for place, code in np.ndenumerate(codes):
        exponent, mantissa, sign = (int(code) >> 1) & 3, int(code) & 1, -1 if code & 8 else 1
        # Two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal.
        expected = 0.5 * mantissa if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert found[place] == sign * expected


@settings(deadline=None)
@given(arrays(np.float32, SHAPES, elements=FLOATS))
def test_e2m1_rounding_is_nearest_with_ties_to_even(values: np.ndarray) -> None:
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for value, found in zip(values.flat, dq.round_e2m1(as_tensor(values)).numpy().flat, strict=True):
        distances = np.abs(grid - abs(value))
        nearest = np.flatnonzero(distances == distances.min())
        even = [index for index in nearest if index % 2 == 0] or [nearest[0]]
        assert abs(found) == grid[even[0]]
        assert found == 0 or np.sign(found) == np.sign(value)


@pytest.mark.parametrize("tie, even", [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (7, 6)])
def test_e2m1_ties(tie: float, even: float) -> None:
    assert dq.round_e2m1(torch.tensor([tie, -tie])).tolist() == [even, -even]


@settings(deadline=None)
@given(arrays(np.float32, SHAPES, elements=FLOATS))
def test_e4m3_rounding_saturates_and_is_idempotent(values: np.ndarray) -> None:
    rounded = dq.round_e4m3(as_tensor(values))
    assert rounded.abs().max() <= 448
    assert torch.equal(dq.round_e4m3(rounded), rounded)
    clipped = as_tensor(values).clamp(-448, 448)
    # Three mantissa bits: half a step is a sixteenth of the value, or 2**-10 among the subnormals.
    assert ((rounded - clipped).abs() <= torch.maximum(clipped.abs() / 16, torch.tensor(2.0**-10))).all()


@settings(deadline=None)
@given(arrays(np.float32, SHAPES, elements=FLOATS), st.floats(1e-3, 1e3))
def test_static_quantizers_stay_on_their_grid(values: np.ndarray, step: float) -> None:
    scale = torch.tensor([step])
    fp8 = dq.fake_quantize_fp8(as_tensor(values), scale)
    assert (fp8.abs() <= 448 * scale).all()
    torch.testing.assert_close(dq.fake_quantize_fp8(fp8, scale), fp8)
    codes = dq.fake_quantize_int8(as_tensor(values), scale) / scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.min() >= -128.01 and codes.max() <= 127.01


@settings(deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.just(48)), elements=st.floats(-100, 100, width=32)))
def test_nvfp4_activations_keep_each_blocks_largest_value_and_its_neighbours(values: np.ndarray) -> None:
    tensor, scale = as_tensor(values), torch.tensor(100 / 2688)
    found = dq.fake_quantize_nvfp4(tensor, scale)
    assert found.shape == tensor.shape and found.isfinite().all()
    for block, rounded in zip(tensor.view(-1, 16), found.view(-1, 16), strict=True):
        largest = block.abs().max()
        # The coarsest step of the grid, from 4 to 6, is a third of the largest value; an E4M3 scale may be off by a
        # sixteenth, or by half of its smallest subnormal.
        bound = largest * (1 / 6 + 1 / 16 + 0.01) + 6 * scale * 2.0**-10
        assert ((rounded - block).abs() <= bound).all()


def test_nvfp4_activations_by_hand() -> None:
    scale = torch.tensor(0.5)
    block = torch.tensor([[6.0, 3.0, -1.4, 0.2] + [0.0] * 12])  # Block scale 6 / 6 / 0.5 = 2, exact in E4M3.
    assert dq.fake_quantize_nvfp4(block, scale)[0, :4].tolist() == [6.0, 3.0, -1.5, 0.0]
    assert dq.fake_quantize_nvfp4(torch.zeros(1, 16), scale).tolist() == [[0.0] * 16]


def test_weights_by_hand() -> None:
    fp8 = torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn)
    assert dq.dequantize_fp8(fp8, torch.tensor([0.5])).tolist() == [[0.5, -224.0]]

    int8 = torch.tensor([[127, -128], [1, 0]], dtype=torch.int8)
    assert dq.dequantize_int8(int8, torch.tensor([2.0, 0.25])).tolist() == [[254.0, -256.0], [0.25, 0.0]]

    # Rows [7, -8, 1, 0] and [-1, 2, 0, 3]; groups of two inputs.
    packed = torch.tensor([[0xF7, 0x28, 0x01, 0x30]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    int4 = [[7.0, -8.0, 10.0, 0.0], [-100.0, 200.0, 0.0, 3000.0]]
    assert dq.dequantize_int4(packed, scale).tolist() == int4
    # Halved, the largest is 1500 and saturates at 448; 50 and 100 lie between 48 and 52, 96 and 104, and go to even.
    w4a8 = [[7.0, -8.0, 10.0, 0.0], [-96.0, 192.0, 0.0, 896.0]]
    assert dq.dequantize_w4a8(packed, scale, torch.tensor([2.0])).tolist() == w4a8

    nibbles = torch.zeros(1, 16, dtype=torch.uint8)
    nibbles[0, :2] = torch.tensor([0x72, 0x9F])  # Columns 1, 6, -6, -0.5.
    blocks = torch.tensor([[2.0, 0.5]]).to(torch.float8_e4m3fn)
    nvfp4 = dq.dequantize_nvfp4(nibbles, blocks, torch.tensor(3.0))
    assert nvfp4[0, :4].tolist() == [6.0, 36.0, -36.0, -3.0]
    assert not nvfp4[0, 4:].any()


@pytest.mark.parametrize("value, code", [(1e9, 448.0), (-1e9, -448.0), (464.0, 448.0), (448.1, 448.0)])
def test_activations_beyond_fp8_saturate(value: float, code: float) -> None:
    assert dq.fake_quantize_fp8(torch.tensor([value]), torch.tensor([1.0])).item() == code


def test_int8_activations_use_the_whole_range() -> None:
    values = torch.tensor([-1e9, -128.4, 0.5, 1.5, 127.6, 1e9])
    assert dq.fake_quantize_int8(values, torch.tensor([1.0])).tolist() == [-128, -128, 0, 2, 127, 127]


def test_tokens_are_rounded_by_their_own_magnitude() -> None:
    tokens = torch.tensor([[448.0, 17.0, -9.5, 0.0], [4.48, 0.17, -0.095, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = dq.fake_quantize_fp8_tokens(tokens)
    torch.testing.assert_close(found[0], torch.tensor([448.0, 16.0, -9.0, 0.0]) + torch.tensor([0, 0, -1.0, 0]))
    torch.testing.assert_close(found[1], found[0] / 100)
    assert not found[2].any()


def test_integers_of_a_token_end_at_its_largest() -> None:
    tokens = torch.tensor([[127.0, 63.4, -126.6], [1.27, 0.634, -1.266], [0.0, 0.0, 0.0]])
    found = dq.fake_quantize_int8_tokens(tokens)
    torch.testing.assert_close(found[0], torch.tensor([127.0, 63.0, -127.0]))
    torch.testing.assert_close(found[1], found[0] / 100)
    assert not found[2].any()


def test_global_scales_of_the_packed_format_are_divisors() -> None:
    packed = torch.tensor([[0x72]], dtype=torch.uint8).repeat(1, 8)
    block = torch.full((1, 1), 2.0).to(torch.float8_e4m3fn)
    multiplied = dq.dequantize_nvfp4(packed, block, torch.tensor(0.25))
    assert multiplied[0, :2].tolist() == [0.5, 3.0]
    assert torch.equal(dq.dequantize_nvfp4_divided(packed, block, torch.tensor([4.0])), multiplied)
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    divided = dq.fake_quantize_nvfp4_divided(values, torch.tensor([8.0]))
    assert torch.equal(divided, dq.fake_quantize_nvfp4(values, torch.tensor(0.125)))
