# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model's layers as exports see them, wherever they come from: plain records of tensors."""

from dataclasses import dataclass

import torch

from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.schemes import UNQUANTIZED, Scheme


@dataclass(frozen=True)
class Linear:
    """A linear layer, or one rank's shard of it, as it was calibrated.

    Attributes:
        weight: (out, in), divided by the pre-quantization scale where there is one.
        bias: (out), or None.
        scheme: How it is quantized.
        weight_amax: Largest magnitudes of the weight: of all of it, of each row (out), or of each block
            (out, in / block size), as the scheme has it; None where nothing is quantized, or the weight is rounded.
        weight_amax_2: The largest magnitude of the weight once more, where the scheme rounds it twice.
        input_amax: Largest magnitude of the input, one element; None where inputs are not rounded, or each token by its
            own.
        pre_quant_scale: (in), factors that the input is multiplied by, or None.
        rounded: The rounded weight, if it does not follow from weight and amax.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scheme: Scheme = UNQUANTIZED
    weight_amax: torch.Tensor | None = None
    weight_amax_2: torch.Tensor | None = None
    input_amax: torch.Tensor | None = None
    pre_quant_scale: torch.Tensor | None = None
    rounded: RoundedWeight | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether its weight is."""
        return self.weight_amax is not None or self.rounded is not None

    @property
    def rounds_inputs(self) -> bool:
        """Whether a server rounds its inputs."""
        return self.input_amax is not None or self.scheme.dynamic_inputs


@dataclass(frozen=True)
class Plain:
    """A norm, an embedding or a router.

    Attributes:
        weight: Any shape.
        bias: (out), or None.
        offset: To be added to the weight: 1 for the gain of a norm that is stored minus one.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    offset: float = 0.0
