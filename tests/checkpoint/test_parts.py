# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Weights that float16 cannot hold are refused as they are read, by name."""

import pytest
import torch

from nemo_ptq.checkpoint.parts import TensorPart, check_fits, fitting
from nemo_ptq.errors import PtqError


def part_of(values: torch.Tensor) -> TensorPart:
    return TensorPart("decoder.final_layernorm.weight", tuple(values.shape), values.dtype, lambda: values)


def test_what_float16_cannot_hold_is_refused_by_name() -> None:
    large = torch.tensor([1.0, -1e5], dtype=torch.bfloat16)
    with pytest.raises(
        PtqError, match=r"^decoder\.final_layernorm\.weight has values of up to 9\.984e\+04, and float16 holds 65504 at"
    ):
        fitting(part_of(large), torch.float16).read()
    assert fitting(part_of(large), torch.bfloat16).read() is large
    assert fitting(part_of(large / 2), torch.float16).read() is not None


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (-7e4, False)])
def test_what_is_rounded_to_the_largest_value_fits(value: float, fits: bool) -> None:
    tensor = torch.tensor([value])
    assert bool(tensor.half().isfinite()) == fits
    if fits:
        check_fits("weight", tensor, torch.float16)
    else:
        with pytest.raises(PtqError):
            check_fits("weight", tensor, torch.float16)
