# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about saved calibrations."""

from dataclasses import replace
from pathlib import Path

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.plan.rules.saved_calibration import (
    model_is_quantized_once,
    rounded_weights_are_there,
    state_is_of_the_model,
    state_is_repeatable,
    state_leaves_no_data_to_run,
)
from nemo_ptq.quantization.state_header import StateHeader
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import LLAMA_2_7B, expect

STATE = "out/ptq/calibration.safetensors"
HEADER = StateHeader("/then", "", LLAMA_8B.identity, "llama", QuantizationConfig(), {"algorithm": "max"}, {})
QUANTIZED = replace(LLAMA_8B, is_quantized=True)


def test_a_model_is_quantized_once() -> None:
    assert model_is_quantized_once(STATE, LLAMA_8B) is None
    assert model_is_quantized_once(None, QUANTIZED) is None
    expect(model_is_quantized_once(STATE, QUANTIZED), "a checkpoint that is quantized already: leave it out")


def test_a_state_is_of_the_model() -> None:
    assert state_is_of_the_model(HEADER, STATE, LLAMA_8B) is None
    assert state_is_of_the_model(HEADER, STATE, replace(LLAMA_8B, config_class="x.MyLlamaConfig")) is None
    assert state_is_of_the_model(HEADER, None, LLAMA_2_7B) is None  # the state that a quantized checkpoint holds
    problem = state_is_of_the_model(HEADER, STATE, LLAMA_2_7B)
    expect(problem, "another model (num_query_groups 8, not 32, ffn_hidden_size 14336, not 11008)")
    expect(problem, "give the checkpoint that was calibrated (then /then)")


def test_a_state_holds_all_that_the_export_needs() -> None:
    searched = replace(HEADER, modelopt_config={"algorithm": {"method": "mse"}})
    assert state_is_repeatable(HEADER, STATE) is None
    assert state_is_repeatable(searched, None) is None
    expect(state_is_repeatable(searched, STATE), "algorithm mse, which searches the weight amaxes")


def test_a_state_leaves_no_data_to_run() -> None:
    assert state_leaves_no_data_to_run(STATE, None) is None
    assert state_leaves_no_data_to_run(None, print) is None
    expect(state_leaves_no_data_to_run(STATE, print), "give one of them")


def test_rounded_weights_are_beside_the_state(tmp_path: Path) -> None:
    rounded = replace(HEADER, quantization=QuantizationConfig(quality="balanced"))
    state = tmp_path / "calibration.safetensors"
    assert rounded_weights_are_there(HEADER, state) is None
    assert rounded_weights_are_there(rounded, None) is None
    expect(rounded_weights_are_there(rounded, state), "put calibration.weights.safetensors there")
    (tmp_path / "calibration.weights.safetensors").touch()
    assert rounded_weights_are_there(rounded, state) is None
