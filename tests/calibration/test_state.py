# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration state: what is in it, and that parallelism during calibration does not show in it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.config import QuantizationConfig
from tests.ranks import run_ranks

# What bfloat16 leaves of a number is within 2^-8 of it; ranges and scales have gone through a few such roundings.
ROUNDING = 2**-6
QUANTIZED = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")


def save_state(checkpoint: Path, algorithm: str, tp: int, pp: int, file: Path) -> None:
    from nemo_ptq.calibration.state import save_calibration_state
    from nemo_ptq.export.ownership import gather_ownership, global_modules
    from tests import steps

    with steps.loaded(checkpoint, tp, pp) as model:
        steps.calibrate(model, QuantizationConfig(algorithm, enable_kv_cache=True))
        modules = global_modules(model.module)
        save_calibration_state(file, modules, gather_ownership(modules))


@pytest.fixture(scope="module")
def state_file(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, int], Path]:
    """The state of a model that was calibrated with an algorithm at a TP and a PP."""

    @cache
    def make(algorithm: str, tp: int, pp: int) -> Path:
        file = tmp_path_factory.mktemp("state") / "calibration.safetensors"
        run_ranks(save_state, tp * pp, checkpoint_of("llama2"), algorithm, tp, pp, file)
        return file

    return make


@pytest.mark.parametrize("algorithm", QUANTIZED)
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 1), (2, 2)])
def test_any_parallelism_teaches_the_same(
    algorithm: str, tp: int, pp: int, state_file: Callable[[str, int, int], Path]
) -> None:
    expected, found = load_file(state_file(algorithm, 1, 1)), load_file(state_file(algorithm, tp, pp))
    assert found.keys() == expected.keys()
    # Stages compute what a single one does; tensor parallelism adds up in another order.
    tolerance = 0.0 if tp == 1 else ROUNDING
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=0.0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("algorithm", QUANTIZED)
def test_holds_what_the_data_has_taught(algorithm: str, state_file: Callable[[str, int, int], Path]) -> None:
    state = load_file(state_file(algorithm, 2, 1))
    linears = {
        "self_attention.linear_qkv": 256,
        "self_attention.linear_proj": 256,
        "mlp.linear_fc1": 256,
        "mlp.linear_fc2": 512,
    }
    expected = {}
    for layer in range(2):
        for linear, inputs in linears.items():
            quantizer = f"decoder.layers.{layer}.{linear}.input_quantizer."
            if algorithm != "int4_awq":
                expected[quantizer + "amax"] = (1,)
            if algorithm not in ("fp8", "nvfp4"):
                expected[quantizer + "pre_quant_scale"] = (inputs,)
        for which in "kv":
            expected[f"decoder.layers.{layer}.self_attention.core_attention.{which}_bmm_quantizer.amax"] = (1,)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert all((value > 0).all() for value in state.values())


def test_is_the_same_file_again(
    checkpoint_of: Callable[[str], Path], state_file: Callable[[str, int, int], Path], tmp_path: Path
) -> None:
    run_ranks(save_state, 2, checkpoint_of("llama2"), "int4_awq", 2, 1, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == state_file("int4_awq", 2, 1).read_bytes()
