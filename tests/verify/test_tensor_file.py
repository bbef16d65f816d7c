# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Values that are not finite are found wherever they are, in tensors that are read in pieces."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_ptq.errors import PtqError
from nemo_ptq.verify import tensor_file
from nemo_ptq.verify.tensor_file import TensorFile

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3_NAN = (0x7F, 0xFF)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_READ_AT_ONCE", 64)


def is_finite(tensor: torch.Tensor, directory: Path) -> bool:
    save_file({"before": torch.ones(3), "weight": tensor}, directory / "file")
    return TensorFile(directory / "file").has_only_finite("weight")


def extremes(dtype: torch.dtype) -> torch.Tensor:
    """(10, 10): the largest numbers and the smallest among others, zero of either sign."""
    info = torch.finfo(dtype)
    values = torch.linspace(-3, 3, 100)
    values[:6] = torch.tensor([info.max, info.min, info.tiny, info.smallest_normal / 2, 0.0, -0.0])
    return values.to(dtype).reshape(10, 10)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn])
def test_numbers_are_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    assert is_finite(extremes(dtype), tmp_path)
    assert is_finite(torch.ones((), dtype=torch.float32).to(dtype), tmp_path)
    assert is_finite(torch.zeros(0, 4).to(dtype), tmp_path)


@pytest.mark.parametrize("place", [0, 63, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_not_finite_is_found(dtype: torch.dtype, value: float, place: int, tmp_path: Path) -> None:
    tensor = extremes(dtype)
    tensor.view(-1)[place] = value
    assert not is_finite(tensor, tmp_path)


@pytest.mark.parametrize("place", [0, 63, 99])
@pytest.mark.parametrize("bits", E4M3_NAN)
def test_the_nan_of_e4m3_is_found(bits: int, place: int, tmp_path: Path) -> None:
    tensor = extremes(torch.float8_e4m3fn)
    tensor.view(torch.uint8).view(-1)[place] = bits
    assert not is_finite(tensor, tmp_path)


def test_whole_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PtqError, match="weight has data type I8, which has no infinity"):
        is_finite(torch.ones(3, dtype=torch.int8), tmp_path)
    with pytest.raises(PtqError, match="tensor other is missing"):
        TensorFile(tmp_path / "file").has_only_finite("other")
