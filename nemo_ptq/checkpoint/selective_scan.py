# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The computation of a Mamba-2 layer between its two linear layers: plain torch, or mamba_ssm's kernels if installed.

Each head has a state (head size, state size) that decays and takes in the position's input:
``state = exp(dt * A) * state + dt * x B^T``, and ``y = state C + D x`` comes out of it.
"""

from typing import Any

import torch
import torch.nn.functional as F

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined: Any = None  # type: ignore[no-redef]

# Positions whose mutual influence is computed at once: a matrix for each head.
_CHUNK = 64
# The same of mamba_ssm's kernels, as Megatron trains with it.
_KERNEL_CHUNK = 128


def selective_scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor
) -> torch.Tensor:
    """Runs sequences through the state spaces of all heads, in float32.

    Args:
        x: (batch, length, heads, head size), the input.
        dt: float32 (batch, length, heads), time steps, above zero.
        A: float32 (heads), decay rates, below zero.
        B: (batch, length, groups, state size), how the input enters the state; groups divide the heads.
        C: (batch, length, groups, state size), how the output is read from it.
        D: float32 (heads), the share of the input that passes by.

    Returns:
        (batch, length, heads, head size) in the data type of ``x``.
    """
    if mamba_chunk_scan_combined is not None and x.is_cuda:
        return mamba_chunk_scan_combined(x, dt, A, B, C, _KERNEL_CHUNK, D=D)
    return _scan_in_chunks(x, dt, A, B, C, D)


def _scan_in_chunks(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor
) -> torch.Tensor:
    batch, length, heads, size = x.shape
    groups, width = B.shape[2:]
    result = torch.empty_like(x)
    state = torch.zeros(batch, groups, heads // groups, size, width, device=x.device)
    for start in range(0, length, _CHUNK):
        which = slice(start, min(start + _CHUNK, length))
        # Positions last but one, heads by group: (batch, group, head, position, ...).
        inputs = x[:, which].float().unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
        steps = dt[:, which].unflatten(2, (groups, -1)).permute(0, 2, 3, 1)
        enter, leave = (projected[:, which].float().permute(0, 2, 1, 3).unsqueeze(2) for projected in (B, C))
        # Logarithm of the decay from before the chunk to each position, that one's own step included.
        decay = (steps * A.view(groups, -1, 1)).cumsum(-1)
        taken = inputs * steps[..., None]
        between = (decay[..., :, None] - decay[..., None, :]).exp().tril()
        mixed = (leave @ enter.transpose(-1, -2) * between) @ taken
        mixed += leave @ state.transpose(-1, -2) * decay.exp()[..., None]
        mixed += inputs * D.view(groups, -1, 1, 1)
        result[:, which] = mixed.permute(0, 3, 1, 2, 4).flatten(2, 3).to(x.dtype)
        left = (decay[..., -1:] - decay).exp()
        state = state * decay[..., -1, None, None].exp() + (taken * left[..., None]).transpose(-1, -2) @ enter
    return result


class GatedNorm(torch.nn.Module):
    """RMSNorm of gated values, each group of channels by itself.

    Args:
        size: Channels.
        groups: Groups of them.
        epsilon: Added to the variance.
        dtype: Data type of the gain.
    """

    def __init__(self, size: int, groups: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of x * silu(gate), both of any shape, and keeps the data type of ``x``."""
        passed = (x.float() * F.silu(gate.float())).unflatten(-1, (self.groups, -1))
        normal = F.rms_norm(passed, passed.shape[-1:], eps=self.epsilon).flatten(-2)
        return (normal * self.weight.float()).to(x.dtype)
