# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Linear layers rebuilt from a directory: dequantized weights, and inputs rounded as a server rounds them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.layout import Linear
from nemo_ptq.verify.reader import Weights

Quantizer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DequantizedLinear:
    """y = quantize_input(x * prequant_scale) @ weight.T + bias.

    Attributes:
        weight: float32 (out, in).
        bias: float32 (out,) or None.
        prequant_scale: float32 (in,) or None.
        quantize_input: Rounds the input to its quantized grid, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    prequant_scale: torch.Tensor | None = None
    quantize_input: Quantizer | None = None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Applies the layer to float32 (..., in)."""
        if self.prequant_scale is not None:
            inputs = inputs * self.prequant_scale
        if self.quantize_input is not None:
            inputs = self.quantize_input(inputs)
        return nn.functional.linear(inputs, self.weight, self.bias)


def load_linear(checkpoint: Weights, linear: Linear, name: str, device: torch.device) -> DequantizedLinear:
    """Reads and dequantizes one linear layer.

    Args:
        checkpoint: Where to read.
        linear: The layer's description, for its algorithm.
        name: The layer's global name, such as "transformer.layers.7.mlp.fc".
        device: Where to compute.
    """

    def read(suffix: str) -> torch.Tensor:
        return checkpoint.tensor(f"{name}.{suffix}").to(device)

    def read_optional(suffix: str) -> torch.Tensor | None:
        return read(suffix).float() if f"{name}.{suffix}" in checkpoint else None

    weight = read("weight")
    quantize_input: Quantizer | None = None
    algorithm = checkpoint.config.quantization.algorithm_of(linear.module)
    if algorithm is None:
        weight = weight.float()
    elif algorithm == "FP8":
        weight = dq.dequantize_fp8(weight, read("weights_scaling_factor"))
        quantize_input = partial(dq.fake_quantize_fp8, scale=read("activation_scaling_factor"))
    elif algorithm == "W8A8_SQ_PER_CHANNEL":
        weight = dq.dequantize_int8(weight, read("weights_scaling_factor"))
        quantize_input = partial(dq.fake_quantize_int8, scale=read("activation_scaling_factor"))
    elif algorithm == "W4A16_AWQ":
        weight = dq.dequantize_int4(weight, read("weights_scaling_factor"))
    elif algorithm == "W4A8_AWQ":
        weight = dq.dequantize_w4a8(weight, read("weights_scaling_factor"), read("weights_scaling_factor_2"))
        quantize_input = partial(dq.fake_quantize_fp8, scale=read("activation_scaling_factor"))
    else:  # NVFP4
        weight = dq.dequantize_nvfp4(weight, read("weights_scaling_factor"), read("weights_scaling_factor_2"))
        quantize_input = partial(dq.fake_quantize_nvfp4, scale=read("activation_scaling_factor"))
    return DequantizedLinear(weight, read_optional("bias"), read_optional("prequant_scaling_factor"), quantize_input)


@dataclass(frozen=True)
class ExpertLinear:
    """The same linear layer of every expert, kept in the file's dtype and dequantized one expert at a time.

    Attributes:
        weight: (experts, out, in), float8_e4m3fn or the model's dtype.
        weight_scale: float32 (experts, 1) or None.
        input_scale: float32 (1,), shared by the experts, or None.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    input_scale: torch.Tensor | None

    def expert(self, index: int) -> DequantizedLinear:
        """One expert's layer."""
        if self.weight_scale is None or self.input_scale is None:
            return DequantizedLinear(self.weight[index].float())
        return DequantizedLinear(
            dq.dequantize_fp8(self.weight[index], self.weight_scale[index]),
            quantize_input=partial(dq.fake_quantize_fp8, scale=self.input_scale),
        )


def load_experts(checkpoint: Weights, name: str, device: torch.device) -> ExpertLinear:
    """Reads one linear layer of all experts by its global name, such as "transformer.layers.7.mlp.fc"."""

    def scale(suffix: str) -> torch.Tensor | None:
        full = f"{name}.{suffix}"
        return checkpoint.tensor(full).to(device) if full in checkpoint else None

    weight = checkpoint.tensor(f"{name}.weight").to(device)
    return ExpertLinear(weight, scale("weights_scaling_factor"), scale("activation_scaling_factor"))
