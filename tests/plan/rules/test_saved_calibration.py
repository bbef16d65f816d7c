# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about saved calibrations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.manifest_writer import write_manifest
from nemo_ptq.plan.rules.saved_calibration import (
    model_is_quantized_once,
    rounded_weights_are_there,
    state_is_as_it_was_made,
    state_is_of_the_model,
    state_is_repeatable,
    state_is_whole,
    state_leaves_no_data_to_run,
)
from nemo_ptq.quantization.state_entries import expected_shapes
from nemo_ptq.quantization.state_header import IN_EXPORT, StateHeader
from nemo_ptq.verify.manifest import MANIFEST
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import LLAMA_2_7B, expect

STATE = Path("out/ptq/calibration.safetensors")
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


NAMES = expected_shapes(HEADER, LLAMA_8B)
WHOLE = {name: ("BF16", shape) for name, shape in NAMES.items()}
FC2, KEYS = "decoder.layers.31.mlp.linear_fc2.input_quantizer.", "self_attention.core_attention.k_bmm_quantizer.amax"


def test_what_the_algorithms_decide_of_a_model() -> None:
    assert len(WHOLE) == 32 * (4 + 2)  # linear layers, and amaxes of the KV cache
    smoothed = expected_shapes(replace(HEADER, quantization=QuantizationConfig("int8_sq")), LLAMA_8B)
    assert len(smoothed) == 32 * 4 * 3
    assert smoothed[f"{FC2}channel_amax"] == (14336,)
    assert smoothed[f"{FC2}amax"] == (1,)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({f"{FC2}amax": None}, f"{FC2}amax is missing: give the export as it was made"),
        ({f"decoder.layers.0.{KEYS}": None, f"decoder.layers.1.{KEYS}": None}, f"0.{KEYS} is missing, and 1 more"),
        ({f"decoder.layers.32.{KEYS}": ("F32", (1,))}, f"32.{KEYS} belongs to no layer of the model"),
        ({f"{FC2}pre_quant_scale": ("F32", (14336,))}, f"{FC2}pre_quant_scale belongs to no layer"),
        ({f"{FC2}amax": ("F32", (2,))}, f"{FC2}amax has shape [2], not [1]"),
        ({f"{FC2}amax": ("I8", (1,))}, f"{FC2}amax is I8, not BF16 or F16 or F32"),
    ],
)
def test_a_state_holds_exactly_what_its_algorithm_decides(change: dict[str, Any], problem: str) -> None:
    assert state_is_whole(HEADER, WHOLE, STATE, STATE, LLAMA_8B) is None
    entries = {name: entry for name, entry in {**WHOLE, **change}.items() if entry is not None}
    expect(state_is_whole(HEADER, entries, STATE, STATE, LLAMA_8B), f"calibration_state={STATE}: ")
    expect(state_is_whole(HEADER, entries, STATE, STATE, LLAMA_8B), problem)
    assert state_is_whole(HEADER, entries, STATE, STATE, LLAMA_2_7B) is None  # another rule says that


def test_a_configuration_of_ones_own_may_quantize_what_it_likes() -> None:
    own = replace(HEADER, quantization=QuantizationConfig("config.json"))
    assert state_is_whole(own, {f"{FC2}amax": ("F32", (1,))}, STATE, STATE, LLAMA_8B) is None
    other = {f"{FC2}weights": ("F32", (1,))}
    expect(state_is_whole(own, other, STATE, STATE, LLAMA_8B), f"{FC2}weights belongs to no layer of the model")


def test_a_state_in_an_export_is_the_one_that_the_manifest_lists(tmp_path: Path) -> None:
    state = tmp_path / IN_EXPORT
    state.parent.mkdir()
    state.write_bytes(b"calibration")
    assert state_is_as_it_was_made(state) is None  # nothing says what it was
    write_manifest(tmp_path, {}, {})
    assert state_is_as_it_was_made(state) is None
    state.write_bytes(b"Calibration")
    expect(state_is_as_it_was_made(state), "is not as it was made: the export's manifest lists it with another blake3")
    (tmp_path / "other").touch()
    state.rename(tmp_path / "calibration.safetensors")
    write_manifest(tmp_path, {}, {})
    (tmp_path / "calibration.safetensors").rename(state)
    expect(state_is_as_it_was_made(state), "the export's manifest does not list it")
    (tmp_path / MANIFEST).write_text("{")
    expect(state_is_as_it_was_made(state), f"calibration_state={state}: ")


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
