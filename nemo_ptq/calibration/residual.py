# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The residual stream that a layer's output is added to, in the unquantized and the quantized model: quality "max".

The residual stream of the quantized model has the errors of all layers so far. The last layer of attention and of an
MLP writes into it: such a layer can make up for these errors, as far as its inputs predict them.
"""

from collections.abc import Mapping
from typing import Any

import torch

from nemo_ptq.calibration.streams import BlockRunner

# The norm that reads the residual stream before a layer writes into it, and a norm that may come between: one of the
# layer's output (Gemma 2 and 3), which is then no linear function of the weight.
_NORMS = {
    "self_attention.linear_proj": ("input_layernorm", "post_self_attention_layernorm"),
    "mlp.linear_fc2": ("pre_mlp_layernorm", "post_mlp_layernorm"),
}


class Residual:
    """The residual stream where one layer writes into it; batches run through the unquantized model first.

    Args:
        norm: The norm that reads it there.
        runner: Knows where kept states wait.
    """

    def __init__(self, norm: torch.nn.Module, runner: BlockRunner) -> None:
        self._runner = runner
        self._exact: list[torch.Tensor] = []
        self._current: torch.Tensor | None = None
        self._hook = norm.register_forward_pre_hook(self._see)

    def keep(self) -> None:
        """Keeps the stream of the batch that runs through the unquantized model, as the next one."""
        assert self._current is not None
        self._exact.append(self._runner.parked(self._current))

    def compare(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compares the stream of the batch that runs through the quantized model with the one kept.

        Args:
            place: Which batch that is.

        Returns:
            What the stream lacks, (tokens, hidden size), and each token's weight, (tokens, 1), both in its own data
            type: a token's inputs and errors are multiplied with the inverse of its root mean square, as the norms do
            that read it afterwards.
        """
        assert self._current is not None
        exact = self._exact[place].to(self._current.device).flatten(0, -2)
        counts = exact.float().square().mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
        # Products with float16 activations must not overflow: 16 is the most that a token counts there.
        counts = counts.clamp(max=torch.finfo(exact.dtype).max ** 0.25)
        return exact - self._current.flatten(0, -2), counts.to(exact.dtype)

    def restore(self) -> None:
        """Restores the norm, and drops what is kept."""
        self._hook.remove()
        self._exact.clear()
        self._current = None

    def _see(self, _: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._current = args[0]


def residual_of(name: str, modules: Mapping[str, torch.nn.Module], runner: BlockRunner) -> Residual | None:
    """Returns the residual stream that a linear layer's output is added to; None of any other layer.

    Args:
        name: The layer, by Megatron's name.
        modules: The modules of its block.
        runner: Computes the block.
    """
    for end, (before, after) in _NORMS.items():
        start = name.removesuffix(end)
        if start != name and start + before in modules and start + after not in modules:
            return Residual(modules[start + before], runner)
    return None
