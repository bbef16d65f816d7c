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
    rounded = [None] * len(plain) if quantized is None else quantized.reshape(-1).split(chunk_size)
    signal, noise = (torch.zeros((), dtype=torch.float64, device=values.device) for _ in range(2))
    extremes: list[torch.Tensor] = []
    for original, other in zip(plain, rounded, strict=True):
        extremes += torch.aminmax(original)
        chunk = original.float()
        signal += torch.dot(chunk, chunk)
        if other is not None:
            difference = chunk - other
            noise += torch.dot(difference, difference)
    largest = torch.stack(extremes).abs().amax()
    return Sums(values.numel(), float(signal), None if quantized is None else float(noise), float(largest))
