# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The state space of a Mamba-2 layer, computed by its definition: position after position, in float32."""

from dataclasses import dataclass

import torch
from torch import nn

from nemo_ptq.verify.linear import Tensors
from nemo_ptq.verify.model_config import Hybrid


@dataclass(frozen=True)
class StateSpace:
    """A layer between norm and residual.

    Attributes:
        sizes: Sizes of the model's state spaces.
        epsilon: Added to the variance of the gated norm.
        into: The first linear layer: gate, input, B, C and time steps stand one after the other.
        out: The last one.
        kernel: float32 (channels, 1, width): the convolution of input, B and C, each channel by itself.
        bias: float32 (channels), that of the convolution.
        gain: float32 (inner size), that of the gated norm.
        a_log: float32 (heads): logarithm of the rate at which the state decays.
        d: float32 (heads): share of the input that passes by.
        dt_bias: float32 (heads), of the time steps.
    """

    sizes: Hybrid
    epsilon: float
    into: Tensors
    out: Tensors
    kernel: torch.Tensor
    bias: torch.Tensor
    gain: torch.Tensor
    a_log: torch.Tensor
    d: torch.Tensor
    dt_bias: torch.Tensor

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes float32 (batch, seq, hidden size) of as many."""
        sizes, inner = self.sizes, self.sizes.inner_size
        projected = sizes.groups * sizes.state_size
        gate, conv, steps = self.into(hidden).split([inner, inner + 2 * projected, sizes.heads], dim=-1)
        padded = nn.functional.pad(conv.transpose(1, 2), (self.kernel.shape[-1] - 1, 0))
        conv = nn.functional.conv1d(padded, self.kernel, self.bias, groups=len(self.kernel)).transpose(1, 2)
        inputs, enter, leave = nn.functional.silu(conv).split([inner, projected, projected], dim=-1)
        mixed = self._recur(
            inputs.unflatten(-1, (sizes.heads, sizes.head_size)),
            nn.functional.softplus(steps + self.dt_bias),
            self._of_heads(enter),
            self._of_heads(leave),
        )
        return self.out(self._normalised(mixed.flatten(-2) * nn.functional.silu(gate)))

    def _of_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """What groups of heads share, (batch, seq, heads, state size)."""
        sizes = self.sizes
        by_group = projected.unflatten(-1, (sizes.groups, sizes.state_size))
        return by_group.repeat_interleave(sizes.heads // sizes.groups, dim=2)

    def _recur(
        self, inputs: torch.Tensor, steps: torch.Tensor, enter: torch.Tensor, leave: torch.Tensor
    ) -> torch.Tensor:
        """Lets the state of each head, (batch, heads, head size, state size), go through the sequence."""
        sizes = self.sizes
        kept = torch.exp(-torch.exp(self.a_log) * steps)
        state = inputs.new_zeros(len(inputs), sizes.heads, sizes.head_size, sizes.state_size)
        found = torch.empty_like(inputs)
        for place in range(inputs.shape[1]):
            taken = (steps[:, place, :, None] * inputs[:, place])[..., None] * enter[:, place, :, None]
            state = state * kept[:, place, :, None, None] + taken
            found[:, place] = (state @ leave[:, place, :, :, None])[..., 0]
        return found + self.d[:, None] * inputs

    def _normalised(self, passed: torch.Tensor) -> torch.Tensor:
        groups = passed.unflatten(-1, (self.sizes.groups, -1))
        return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.epsilon)).flatten(-2) * self.gain
