# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What activation ranges are at least."""

from nemo_ptq.config import QuantizationConfig

# Squared ReLU leaves many channels nearly unused in a short calibration: activation ranges of decoder "gpt" are kept
# above one hundredth of the format's largest value, as NVIDIA's own tool does.
_GPT_AMAX_FLOOR = {"fp8": 0.01 * 448.0, "int8_sq": 0.01 * 127.0}


def amax_floor(quantization: QuantizationConfig, decoder: str) -> float | None:
    """Returns what activation ranges of a job are at least, None where they may be anything."""
    return _GPT_AMAX_FLOOR.get(quantization.algorithm or "") if decoder == "gpt" else None
