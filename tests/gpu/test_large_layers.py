# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a GPU does with layers that are large beside its memory: some rows at a time, in place, in turns."""

import pytest
import torch

from nemo_ptq.calibration.awq import search_scale
from nemo_ptq.calibration.statistics import Moments
from nemo_ptq.checkpoint import blocks
from nemo_ptq.quantization import pieces

pytestmark = pytest.mark.gpu

ROWS, COLUMNS, BLOCK = 640, 256, 64


def search(device: str) -> torch.Tensor:
    """AWQ's scale of one seeded layer, found on a device; on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).bfloat16().to(device)
    channels = torch.rand(COLUMNS, generator=generator) * 4
    inputs = (torch.randn(2048, COLUMNS, generator=generator) * channels).bfloat16().to(device)
    moments = Moments(COLUMNS, COLUMNS, weight.device)
    moments.observe(inputs, inputs)
    return search_scale(weight, moments, BLOCK).cpu()


def test_the_search_in_pieces_finds_what_the_search_at_once_does(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = search("cuda")
    monkeypatch.setattr(pieces, "_AT_ONCE", 1)
    torch.testing.assert_close(search("cuda"), at_once, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(search("cpu"), at_once, rtol=1e-4, atol=0.0)


def test_weights_arrive_whole_through_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SENT_AT_ONCE", 4096)
    source = torch.randn(1000, 77, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.empty_like(source, device="cuda")
    blocks._copy_through_page_locked(target, source)
    assert torch.equal(target.cpu(), source)
