# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where qualities "balanced" and "max" are available: a job is then "balanced" where the user does not say."""

from collections.abc import Sequence
from typing import Any

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.algorithms import SELECTABLE, algorithm_of


def obstacle_to_balanced(
    algorithm: str | None,
    formats: Sequence[str],
    forward_loop: Any,
    calibration_tp: int,
    calibration_ep: int,
    model: ModelSpec,
    kv_cache_only: bool = False,
) -> tuple[str, str] | None:
    """Says why a job cannot have quality "balanced" or "max", and what to change; None where it can."""
    if kv_cache_only:
        return "kv_cache_only leaves all weights in 16 bits", "leave kv_cache_only out"
    if not algorithm_of(QuantizationConfig(algorithm)).has_balanced:
        known = ", ".join(name for name, record in SELECTABLE.items() if record.has_balanced)
        return f"algorithm={algorithm} rounds to the nearest codes alone", f"use one of {known}"
    for name in formats:
        if not FORMATS[name].is_packed:
            return f"export_format={name} holds weights that are not rounded yet", "use another format"
    if forward_loop is not None:
        return "a forward_loop does not walk block by block", "give calibration_dataset instead"
    if model.is_quantized:
        return "the checkpoint is quantized already", "give the checkpoint as it was before"
    if calibration_ep > 1:
        return f"calibration_ep={calibration_ep}, and all experts of a layer are rounded on one rank", "use 1"
    if model.hidden_size % calibration_tp:
        return (
            f"calibration_tp={calibration_tp} does not divide hidden_size {model.hidden_size}, and ranks round equal "
            "shares of its rows",
            "use a smaller calibration_tp",
        )
    return None
