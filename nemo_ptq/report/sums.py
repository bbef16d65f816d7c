# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Sums over a tensor, and over what quantization makes of it."""

import torch

from nemo_ptq.report.metrics import Sums

# Elements that are turned into float32 at a time: on a CPU as many as its cache holds, which is several times as fast.
_CHUNK, _CPU_CHUNK = 1 << 22, 1 << 18


def sums_of(values: torch.Tensor, quantized: torch.Tensor | None = None) -> Sums:
    """Sums over a tensor of any shape and floating dtype, and over what quantization makes of it."""
    if not values.numel():
        return Sums()
    chunk_size = _CHUNK if values.is_cuda else _CPU_CHUNK
    plain = values.reshape(-1).split(chunk_size)
    signal = sum(chunk.float().square().sum(dtype=torch.float64) for chunk in plain)
    noise = None
    if quantized is not None:
        rounded = quantized.reshape(-1).split(chunk_size)
        pairs = zip(plain, rounded, strict=True)
        noise = sum((a.float() - b.float()).square().sum(dtype=torch.float64) for a, b in pairs)
    largest = torch.stack([chunk.abs().amax() for chunk in plain]).amax()
    return Sums(values.numel(), float(signal), None if noise is None else float(noise), float(largest))
