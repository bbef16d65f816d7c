# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is computed some rows at a time is what is computed at once."""

import pytest
import torch

from nemo_ptq.export.calibrated import smoothed, weight_amax
from nemo_ptq.export.module_tensors import Linear
from nemo_ptq.export.simulation import rounded_weight
from nemo_ptq.quantization import pieces
from nemo_ptq.quantization.schemes import scheme_for

ROWS, COLUMNS = 300, 64


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pieces, the last one shorter than the others."""
    monkeypatch.setattr(pieces, "_AT_ONCE", 1)


@pytest.mark.usefixtures("small")
def test_smoothing(weight: torch.Tensor) -> None:
    scale = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.5
    assert len(weight.split(pieces.rows_at_once(weight))) == 3
    assert torch.equal(smoothed(weight, scale), (weight * (1.0 / scale)[None, :]).to(weight.dtype))


@pytest.mark.parametrize(
    ("algorithm", "block_size"), [("fp8", 0), ("int8_sq", 0), ("int4_awq", 32), ("w4a8_awq", 32), ("nvfp4", 16)]
)
def test_rounding(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch, algorithm: str, block_size: int) -> None:
    scheme = scheme_for(algorithm, block_size)
    second = weight.abs().amax() if algorithm == "w4a8_awq" else None
    layer = Linear(weight, None, scheme, weight_amax(weight, scheme), second, torch.tensor([3.0]))
    whole = rounded_weight(layer)
    monkeypatch.setattr(pieces, "_AT_ONCE", 1)
    assert whole.dtype == torch.float32 and not torch.equal(whole, weight.float())
    assert torch.equal(rounded_weight(layer), whole)
