# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A weight that is rounded already: codes that do not follow from the weight and its scales alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RoundedWeight:
    """The codes and scales of a weight (out, in), or of one rank's shard of it.

    Attributes:
        codes: (out, in), not packed: float8_e4m3fn, int8 of INT8 and INT4, or uint8 of FP4.
        scale: As it is stored: float32 (1) of FP8, (out) of INT8, (out, groups) of INT4, or float8_e4m3fn
            (out, blocks) of NVFP4.
        scale_2: float32 (1): the scale of NVFP4's scales, or the one at which W4A8 rounds once more.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor | None = None

    def rows(self, which: slice) -> "RoundedWeight":
        """Returns some output rows."""
        scale = self.scale[which] if self.scale.numel() > 1 else self.scale
        return replace(self, codes=self.codes[which], scale=scale)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RoundedWeight":
        """Returns the same with each tensor changed, e.g. moved to another device."""
        scale_2 = None if self.scale_2 is None else change(self.scale_2)
        return RoundedWeight(change(self.codes), change(self.scale), scale_2)
