# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whether a job keeps all weights in memory or one block of them: the one rule, for the plan and for the engine."""

from collections.abc import Mapping, Sequence

from nemo_ptq.config import CUSTOM, QuantizationConfig
from nemo_ptq.export.formats import FORMATS

RESIDENT, LAYERWISE = "resident", "layer-wise"
"""All of a rank's weights in memory, or one block of them at a time."""


def whole_model_needs(
    generate_sample: bool, algorithm: str | None, has_loop: bool, is_quantized: bool, formats: Sequence[str]
) -> Mapping[str, str]:
    """Names a request of the job that needs all weights in memory, and why; nothing where it can run layer-wise.

    Args:
        generate_sample: Whether text is generated after calibration.
        algorithm: The algorithm, or the file of a ModelOpt config.
        has_loop: Whether the user gave a calibration loop.
        is_quantized: Whether the checkpoint is quantized already.
        formats: The export formats.
    """
    is_custom = QuantizationConfig(algorithm).algorithm_name == CUSTOM
    whole = [name for name in formats if not FORMATS[name].is_packed]
    reasons = {
        "generate_sample": (generate_sample, "export_config.generate_sample=true runs all of them for each token"),
        "algorithm": (is_custom, f"quantization_config.algorithm={algorithm} has ModelOpt calibrate the whole model"),
        "forward_loop": (has_loop, "forward_loop runs the whole model"),
        "checkpoint": (is_quantized, "ModelOpt restores a quantized checkpoint's whole model"),
        "formats": (bool(whole), f"export_format={', '.join(whole)} is written from the whole model"),
    }
    return {what: why for what, (asked, why) in reasons.items() if asked}


def runs_layerwise(asked: bool | None, needs_whole_model: bool, resident_bytes: int, free_bytes: int) -> bool:
    """Decides whether one block of weights is in memory at a time.

    Args:
        asked: The user's choice; None leaves it open.
        needs_whole_model: Whether the job can only run with all weights in memory.
        resident_bytes: Peak memory of a rank with all of its weights in memory.
        free_bytes: Memory that it may fill.
    """
    if asked is not None:
        return asked
    return not needs_whole_model and resident_bytes > free_bytes
