# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""GPTQ against naive references: one column at a time in float64, and every code there is on tiny problems."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch

from nemo_ptq.calibration import gptq
from nemo_ptq.calibration.gptq import (
    InverseFactor,
    Rounded,
    inverse_factor,
    moved,
    output_error,
    predictable_share,
    round_fp8,
    round_int4,
    round_int8,
    round_nvfp4,
    smoothed,
)
from nemo_ptq.calibration.search import nvfp4_block_scales
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.grids import FP4, FP8, INT4, INT8, Grid
from nemo_ptq.quantization.rounding import (
    block_scales,
    pack_fp4,
    pack_int4,
    scale_of,
    to_fp8,
    to_int4,
    to_int8,
    to_nvfp4,
)
from nemo_ptq.verify import dequantize as dq

GROUP = 16
FORMATS = ("fp8", "int8", "int4", "w4a8", "nvfp4")


def layer(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in), and inputs (tokens, in) that are correlated and of unequal size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) + torch.eye(inputs)
    sizes = torch.randn(inputs, generator=generator).exp()
    inputs_ = torch.randn(tokens, inputs, generator=generator) @ mix * sizes
    return torch.randn(outputs, inputs, generator=generator) * 0.02, inputs_


def plain_scale(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The scales that amax gives: of FP8 and NVFP4, that of the whole tensor."""
    weight = weight.float()
    if name == "int8":
        return scale_of(weight.abs().amax(1), 127.0)
    if name in ("int4", "w4a8"):
        return scale_of(weight.unflatten(1, (-1, GROUP)).abs().amax(-1), 7.0)
    return scale_of(weight.abs().amax(), {"fp8": 448.0, "nvfp4": 448.0 * 6}[name]).reshape(1)


def fp8_scale(weight: torch.Tensor) -> torch.Tensor:
    return scale_of(weight.float().abs().amax(), 448.0).reshape(1)


def by_gptq(name: str, weight: torch.Tensor, gram: torch.Tensor) -> Rounded:
    factor, scale = inverse_factor(gram, sort=name != "nvfp4"), plain_scale(name, weight)
    if name == "w4a8":
        return round_int4(weight, factor, scale, fp8_scale(weight))
    round_: dict[str, Callable[[torch.Tensor, InverseFactor, torch.Tensor], Rounded]] = {
        "fp8": round_fp8,
        "int8": round_int8,
        "int4": round_int4,
        "nvfp4": round_nvfp4,
    }
    return round_[name](weight, factor, scale)


def plain(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight rounded to nearest, (out, in), as a reader computes with it."""
    weight, scale = weight.float(), plain_scale(name, weight)
    if name == "fp8":
        return dq.dequantize_fp8(to_fp8(weight, scale), scale)
    if name == "int8":
        return dq.dequantize_int8(to_int8(weight, scale), scale)
    if name == "int4":
        return dq.dequantize_int4(to_int4(weight, scale), scale)
    if name == "w4a8":
        return dq.dequantize_w4a8(to_int4(weight, scale), scale, fp8_scale(weight))
    blocks = block_scales(weight, scale, 16)
    return dq.dequantize_nvfp4(to_nvfp4(weight, blocks, scale[0]), blocks, scale[0])


def read(name: str, rounded: Rounded, weight: torch.Tensor) -> torch.Tensor:
    """What verify's readers make of codes and scales."""
    if name == "w4a8":
        return dq.dequantize_w4a8(pack_int4(rounded.codes), rounded.scale, fp8_scale(weight))
    if name == "nvfp4":
        return dq.dequantize_nvfp4(pack_fp4(rounded.codes), rounded.scale, plain_scale(name, weight)[0])
    if name == "int4":
        return dq.dequantize_int4(pack_int4(rounded.codes), rounded.scale)
    readers = {"fp8": dq.dequantize_fp8, "int8": dq.dequantize_int8}
    return readers[name](rounded.codes, rounded.scale)


def column_by_column(
    weight: torch.Tensor, hessian: torch.Tensor, order: list[int], steps: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Optimal Brain Quantization in a fixed order, in float64: the inverse is made anew for each column."""
    weight, left = weight.double().clone(), list(order)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        value = grid.nearest((weight[:, column] / steps[:, column]).float()).double() * steps[:, column]
        error = (weight[:, column] - value) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
        weight[:, column] = value
        left.pop(0)
    return weight


def damped(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("tokens", [400, 20])
def test_the_factor_is_of_the_damped_inverse(sort: bool, tokens: int) -> None:
    _, inputs = layer(1, 48, tokens)
    gram = inputs.T @ inputs
    factor = inverse_factor(gram, sort)
    inverse = torch.linalg.inv(damped(gram))
    found = factor.upper.double().T @ factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(found, inverse[factor.order][:, factor.order], rtol=1e-5, atol=1e-6 * inverse.max())
    torch.testing.assert_close(factor.importance.double(), 1 / inverse.diagonal(), rtol=1e-5, atol=0)
    sizes = gram.diagonal()[factor.order]
    assert not sort or (sizes[1:] <= sizes[:-1]).all()
    assert sort or factor.order.tolist() == list(range(48))


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("inputs", [32, 192])
def test_blocks_round_as_one_column_after_the_other(name: str, inputs: int) -> None:
    weight, activations = layer(6, inputs, 600)
    gram = activations.T @ activations
    rounded, scale = by_gptq(name, weight, gram), plain_scale(name, weight)
    steps = scale.reshape(len(scale), -1).double()
    steps = steps.repeat_interleave(inputs // steps.shape[1], 1).expand(6, inputs)
    order = gram.diagonal().argsort(descending=True).tolist()
    grid = {"fp8": FP8, "int8": INT8, "int4": INT4}[name]
    expected = column_by_column(weight, damped(gram), order, steps, grid)
    # A value that is within float32's rounding of the middle between two codes may fall to either side, and the rest of
    # its row with it.
    same = (rounded.weight.double() - expected).abs().amax(1) <= 1e-6
    assert same.double().mean() >= 0.8
    found, reference = (output_error(w - weight, damped(gram)).sum() for w in (rounded.weight, expected))
    torch.testing.assert_close(found, reference, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_nearest_is_worse_in_every_format(name: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        weight, inputs = layer(24, 160, 1000, seed)
        weight, gram = weight.to(dtype), inputs.T @ inputs
        rounded = by_gptq(name, weight, gram)
        ours = output_error(rounded.weight - weight.float(), gram).sum()
        theirs = output_error(plain(name, weight) - weight.float(), gram).sum()
        assert ours < 0.9 * theirs


@pytest.mark.parametrize("name", FORMATS)
def test_readers_find_the_rounded_weight_in_the_codes(name: str) -> None:
    weight, inputs = layer(24, 160, 1000)
    rounded = by_gptq(name, weight, inputs.T @ inputs)
    assert torch.equal(read(name, rounded, weight), rounded.weight)


def test_products_with_triangular_matrices_leave_out_zeros_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(24, 160, 1000)
    gram = inputs.T @ inputs
    share = partial(
        predictable_share, gram, mean=gram.diagonal().mean(), lack=torch.tensor(1e14), tokens=torch.tensor(1000.0)
    )
    factor = inverse_factor(gram)
    whole = factor.upper, moved(weight, weight @ gram, factor), share(factor=factor)
    monkeypatch.setattr(gptq, "_PRODUCED_AT_ONCE", 48)
    monkeypatch.setattr(gptq, "_INVERTED_AT_ONCE", 32)
    factor = inverse_factor(gram)
    parts = factor.upper, moved(weight, weight @ gram, factor), share(factor=factor)
    for part, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)


def test_the_best_codes_of_a_tiny_layer_are_nearly_reached() -> None:
    """All 16^4 roundings of rows of four inputs."""
    weight, inputs = layer(8, 4, 100)
    gram = inputs.T @ inputs
    scale = scale_of(weight.abs().amax(1, keepdim=True), 7.0)
    codes = torch.tensor(list(product(range(-8, 8), repeat=4)), dtype=torch.float64)
    least = torch.stack(
        [output_error(codes * step - row, damped(gram)).min() for row, step in zip(weight, scale, strict=True)]
    )
    found = output_error(round_int4(weight, inverse_factor(gram), scale).weight - weight, damped(gram))
    assert (found >= least * (1 - 1e-4)).all()
    nearest = output_error(dq.dequantize_int4(to_int4(weight, scale), scale) - weight, damped(gram))
    assert found.sum() - least.sum() < 0.25 * (nearest.sum() - least.sum())
    assert torch.isclose(found, least, rtol=1e-4).double().mean() >= 0.5


def test_rows_do_not_depend_on_one_another() -> None:
    """What has a rank of a column-parallel layer decide as one rank alone would."""
    weight, inputs = layer(32, 96, 500)
    factor = inverse_factor(inputs.T @ inputs)
    scale = plain_scale("int4", weight)
    whole = round_int4(weight, factor, scale)
    halves = [round_int4(weight[rows], factor, scale[rows]) for rows in (slice(0, 16), slice(16, 32))]
    assert torch.equal(torch.cat([half.codes for half in halves]), whole.codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_multiple_of_the_gram_matrix_gives_the_same_codes(name: str) -> None:
    weight, inputs = layer(8, 64, 500)
    gram = inputs.T @ inputs
    assert torch.equal(
        by_gptq(name, weight, gram).codes.view(torch.uint8), by_gptq(name, weight, gram / 4096).codes.view(torch.uint8)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_that_no_token_used_are_rounded_to_nearest(name: str) -> None:
    weight, inputs = layer(8, 64, 500)
    inputs[:, 16:32] = 0
    rounded = by_gptq(name, weight, inputs.T @ inputs)
    if name == "nvfp4":  # its scales are still chosen, by an error in which these inputs count the same
        scale_2 = plain_scale(name, weight)
        scale = nvfp4_block_scales(weight[:, 16:32], torch.ones(16), scale_2)
        expected = dq.dequantize_nvfp4(to_nvfp4(weight[:, 16:32], scale, scale_2[0]), scale, scale_2[0])
    else:
        expected = plain(name, weight)[:, 16:32]
    torch.testing.assert_close(rounded.weight[:, 16:32], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4", "w4a8"])
def test_without_any_token_everything_is_rounded_to_nearest(name: str) -> None:
    weight, _ = layer(8, 64, 1)
    assert torch.equal(by_gptq(name, weight, torch.zeros(64, 64)).weight, plain(name, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_tokens_than_inputs(dtype: torch.dtype) -> None:
    weight, inputs = layer(8, 256, 16)
    gram = inputs.T @ inputs
    rounded = round_int4(weight, inverse_factor(gram, dtype=dtype), plain_scale("int4", weight))
    assert rounded.weight.isfinite().all()
    nearest = output_error(plain("int4", weight) - weight, gram).sum()
    assert output_error(rounded.weight - weight, gram).sum() < 0.2 * nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_very_unequal_size(dtype: torch.dtype) -> None:
    """The smallest of the diagonal is a ten-millionth of its mean, and one input is a thousand times the others."""
    weight, inputs = layer(16, 128, 2000)
    inputs /= inputs.square().mean(0).sqrt()
    inputs[:, 5] *= 1000
    inputs[:, 7] *= 3e-2
    gram = inputs.T @ inputs
    assert gram.diagonal().min() / gram.diagonal().mean() < 1.2e-7
    factor = inverse_factor(gram, dtype=dtype)
    assert factor.damping == pytest.approx(0.01)
    inverse = torch.linalg.inv(damped(gram))
    torch.testing.assert_close(factor.importance.double(), 1 / inverse.diagonal(), rtol=1e-3, atol=0)
    rounded = round_int4(weight, factor, plain_scale("int4", weight))
    ours, theirs = (output_error(value - weight, gram).sum() for value in (rounded.weight, plain("int4", weight)))
    assert ours < theirs


def test_damping_grows_until_the_matrix_can_be_decomposed() -> None:
    _, inputs = layer(1, 32, 100)
    gram = inputs.T @ inputs
    spoilt = gram - 0.05 * gram.diagonal().mean() * torch.eye(32)
    assert torch.linalg.eigvalsh(damped(spoilt)).min() < 0
    factor = inverse_factor(spoilt)
    assert factor.damping == pytest.approx(0.1)
    inverse = torch.linalg.inv(damped(spoilt, factor.damping))
    torch.testing.assert_close(factor.importance.double(), 1 / inverse.diagonal(), rtol=1e-4, atol=0)


def test_a_matrix_that_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(PtqError, match="not positive"):
        inverse_factor(torch.full((4, 4), 1000.0).fill_diagonal_(1.0))
    with pytest.raises(PtqError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.inf))


def test_a_weight_of_other_inputs_is_refused() -> None:
    weight, inputs = layer(8, 64, 100)
    with pytest.raises(PtqError, match=r"\(8, 32\).* 64 inputs"):
        round_int8(weight[:, :32], inverse_factor(inputs.T @ inputs), plain_scale("int8", weight))


def test_sorted_columns_are_refused_where_scales_are_chosen_on_the_way() -> None:
    weight, inputs = layer(8, 64, 100)
    with pytest.raises(PtqError, match="sort=False"):
        round_nvfp4(weight, inverse_factor(inputs.T @ inputs), plain_scale("nvfp4", weight))


def test_the_target_is_the_least_squares_answer() -> None:
    """W' minimises || X W^T - X_q W'^T ||^2 + damping || W' - W ||^2, which is solved here from the tokens."""
    weight, inputs = layer(8, 64, 500)
    quantized = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)) * inputs.std()
    gram, cross = quantized.T @ quantized, (inputs - quantized).T @ quantized
    factor = inverse_factor(gram)
    found = moved(weight, weight @ cross, factor)
    root = (0.01 * gram.diagonal().mean().double()).sqrt()
    rows = torch.cat([quantized.double(), root * torch.eye(64, dtype=torch.float64)])
    start = weight.double().T
    wanted = torch.cat([inputs.double() @ start, root * start])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_the_target_brings_the_output_closer(name: str) -> None:
    weight, inputs = layer(24, 96, 1000)
    quantized = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)) * inputs.std()
    gram, cross = quantized.T @ quantized, (inputs - quantized).T @ quantized
    target = moved(weight, weight @ cross, inverse_factor(gram))
    errors = [
        (inputs @ weight.T - quantized @ by_gptq(name, start, gram).weight.T).square().sum()
        for start in (target, weight)
    ]
    assert errors[0] < 0.95 * errors[1]


def test_smoothed_inputs_have_the_smoothed_gram_matrix() -> None:
    _, inputs = layer(1, 16, 50)
    scale = torch.linspace(0.1, 3, 16)
    torch.testing.assert_close(
        smoothed(inputs.T @ inputs, scale), (inputs * scale).T @ (inputs * scale), rtol=1e-4, atol=1e-3
    )


def test_nearest_values_are_those_of_the_codes() -> None:
    values = torch.linspace(-9, 9, 3601)[:, None].expand(-1, 2).contiguous()
    one = torch.ones(1)
    assert torch.equal(FP4.nearest(values), dq.unpack_e2m1(to_nvfp4(values, one.expand(3601, 1), one)))
    assert torch.equal(INT4.nearest(values[:3600]), dq.unpack_int4(to_int4(values[:3600], one.expand(3600, 1))).float())
    assert torch.equal(INT8.nearest(values * 20), to_int8(values * 20, one.expand(3601)).float())
    assert torch.equal(FP8.nearest(values * 40), to_fp8(values * 40, one).float())


def test_what_is_noise_is_not_corrected_and_what_follows_from_the_inputs_is() -> None:
    generator = torch.Generator().manual_seed(11)
    given = torch.randn(2048, 64, generator=generator)
    factor = inverse_factor(given.T @ given)
    mean, tokens = (given.T @ given).diagonal().mean(), torch.tensor(2048.0)

    def share(lack: torch.Tensor) -> float:
        return float(predictable_share(lack.T @ given, factor, mean, lack.square().sum(), tokens))

    noise = torch.randn(2048, 64, generator=generator)
    drift = given @ torch.randn(64, 64, generator=generator) / 8
    assert share(noise) < 0.1
    assert share(drift) > 0.99
    assert share(noise) < share(drift + noise) < share(drift)
    assert share(torch.zeros_like(noise)) == 0


def test_with_fewer_tokens_than_inputs_nothing_is_corrected() -> None:
    given = torch.randn(32, 64, generator=torch.Generator().manual_seed(12))
    factor = inverse_factor(given.T @ given, damping=1e-6)
    mean = (given.T @ given).diagonal().mean()
    assert predictable_share(given.T @ given, factor, mean, given.square().sum(), torch.tensor(32.0)) < 0.01
