# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A calibration state with values that cannot be scales is refused by the name of the tensor."""

from pathlib import Path

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.state import CalibrationState, load_state, save_state
from nemo_ptq.quantization.state_header import StateHeader

HEADER = StateHeader("/then", "", {}, "llama", QuantizationConfig("int8_sq"), {"algorithm": "smoothquant"}, {})
LAYER = "decoder.layers.0.mlp.linear_fc2.input_quantizer."


@pytest.mark.parametrize(
    ("kind", "value"),
    [("amax", 0.0), ("amax", -1.0), ("amax", float("nan")), ("pre_quant_scale", float("inf")), ("channel_amax", -1.0)],
)
def test_a_value_that_is_no_scale(kind: str, value: float, tmp_path: Path) -> None:
    file = tmp_path / "calibration.safetensors"
    sound = {f"{LAYER}amax": torch.ones(1, dtype=torch.bfloat16), f"{LAYER}pre_quant_scale": torch.ones(4)}
    sound[f"{LAYER}channel_amax"] = torch.tensor([0.0, 1.0, 2.0, 3.0])  # the first channel was never used
    save_state(file, CalibrationState(HEADER, sound))
    assert load_state(file).tensors.keys() == sound.keys()
    sound[f"{LAYER}{kind}"][-1] = value
    save_state(file, CalibrationState(HEADER, sound))
    with pytest.raises(PtqError, match=f"calibration_state={file}: {LAYER}{kind} holds values that are not finite"):
        load_state(file)
