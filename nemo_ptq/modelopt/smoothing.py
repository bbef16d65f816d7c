# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Pre-quantization scales, remembered as exactly as they were applied.

ModelOpt multiplies the weight with a scale in float32 and keeps the scale in the weight's data type. What was
multiplied can be repeated from the exact scale only, so that is kept beside the layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.quantization import model_calib

from nemo_ptq.parallel.attributes import replaced

_modelopts_smoothing = model_calib.apply_pre_quant_scale_and_smooth


def smooth(linear: Any, pre_quant_scale: torch.Tensor) -> None:
    """Scales the inputs of a linear layer, and its weight the other way, as ModelOpt does.

    Args:
        linear: A Megatron linear layer with ModelOpt's quantizers, not smoothed yet.
        pre_quant_scale: float32 (local in-features): what the input is multiplied with before it is rounded.
    """
    _modelopts_smoothing(linear, pre_quant_scale)
    linear.exact_pre_quant_scale = pre_quant_scale.detach().float().cpu()


def exact_pre_quant_scale(linear: Any) -> torch.Tensor | None:
    """Returns the scale that :func:`smooth` has applied, float32 (local in-features) on the CPU, if it has."""
    return getattr(linear, "exact_pre_quant_scale", None)


@contextmanager
def modelopt_keeps_scales() -> Iterator[None]:
    """Has ModelOpt's own algorithms smooth through :func:`smooth`, within a ``with`` block."""
    with replaced(model_calib, "apply_pre_quant_scale_and_smooth", smooth):
        yield
