# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration state: what is in it, and that parallelism during calibration does not show in it."""

import json
import math
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.state_header import IN_EXPORT, StateHeader, read_header
from tests.matrix import quick_first
from tests.modelopt.test_quantizers import CUSTOM_FP8, LEGACY_AWQ, write_config
from tests.ranks import run_ranks

# What bfloat16 leaves of a number is within 2^-8 of it; amaxes and scales have gone through a few such roundings.
ROUNDING = 2**-6
QUANTIZED = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")


def calibrate_and_export(
    checkpoint: Path, quantization: QuantizationConfig, layout: tuple[int, ...], file: Path, output: Path | None = None
) -> None:
    """Calibrates at a TP, a PP and an EP, and exports for one rank; copies the state."""
    from tests import steps

    output = output or file.with_suffix("")
    steps.run_job(steps.job_of(checkpoint, quantization, output, layout))
    if int(os.environ["RANK"]) == 0:
        shutil.copyfile(output / IN_EXPORT, file)


def apply_and_export(checkpoint: Path, file: Path, layout: tuple[int, ...], output: Path) -> None:
    """Exports for one rank from a saved state, with the engine."""
    from tests import steps

    tp, pp, ep = (*layout, 1)[:3]
    sizes = {"calibration_tp": tp, "calibration_pp": pp, "calibration_ep": ep, "world_size": tp * pp * ep}
    export = ExportConfig(str(output))
    steps.run_job(check_job(nemo_checkpoint=checkpoint, calibration_state=file, export_config=export, **sizes))


@pytest.fixture(scope="module")
def state_file(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, int], Path]:
    """The state of a model that was calibrated with an algorithm at a TP and a PP."""

    @cache
    def make(algorithm: str, tp: int, pp: int) -> Path:
        file = tmp_path_factory.mktemp("state") / "calibration.safetensors"
        quantization = QuantizationConfig(algorithm, enable_kv_cache=True)
        run_ranks(calibrate_and_export, tp * pp, checkpoint_of("llama2"), quantization, (tp, pp), file)
        return file

    return make


@pytest.mark.parametrize("algorithm", QUANTIZED)
@pytest.mark.parametrize(
    ("tp", "pp"),
    [pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2)],
)
def test_any_parallelism_teaches_the_same(
    algorithm: str, tp: int, pp: int, state_file: Callable[[str, int, int], Path]
) -> None:
    expected, found = load_file(state_file(algorithm, 1, 1)), load_file(state_file(algorithm, tp, pp))
    assert found.keys() == expected.keys()
    # Stages compute what a single one does; tensor parallelism adds up in another order.
    tolerance = 0.0 if tp == 1 else ROUNDING
    for name, value in expected.items():
        # The maximum of a single channel is one rounded number; a scale is a power of it, of 0.8 at most.
        rtol = {"channel_amax": 4, "pre_quant_scale": 3.2}.get(name.rpartition(".")[2], 1) * tolerance
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=0.0, msg=lambda text, n=name: f"{n}: {text}")


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
            if algorithm in ("int8_sq", "w4a8_awq"):
                expected[quantizer + "channel_amax"] = (inputs,)
        for which in "kv":
            expected[f"decoder.layers.{layer}.self_attention.core_attention.{which}_bmm_quantizer.amax"] = (1,)
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert all((value > 0).all() for value in state.values())


def test_is_the_same_file_again(
    checkpoint_of: Callable[[str], Path], state_file: Callable[[str, int, int], Path], tmp_path: Path
) -> None:
    quantization = QuantizationConfig("int4_awq", enable_kv_cache=True)
    run_ranks(calibrate_and_export, 2, checkpoint_of("llama2"), quantization, (2, 1), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == state_file("int4_awq", 2, 1).read_bytes()


def check_applied(
    checkpoint: Path,
    quantization: QuantizationConfig,
    learned: tuple[int, ...],
    layouts: list[tuple[int, ...]],
    root: Path,
) -> None:
    """What is exported from a saved state, at any parallelism, is what was exported after calibrating."""
    state, direct = root / "state.safetensors", root / "direct"
    run_ranks(calibrate_and_export, math.prod(learned), checkpoint, quantization, learned, state, direct)
    for layout in layouts:
        again = root / "x".join(map(str, layout))
        run_ranks(apply_and_export, math.prod(layout), checkpoint, state, layout, again)
        assert (again / "rank0.safetensors").read_bytes() == (direct / "rank0.safetensors").read_bytes(), layout
        assert (again / "config.json").read_bytes() == (direct / "config.json").read_bytes()


@pytest.mark.parametrize("algorithm", quick_first(QUANTIZED, ("int8_sq", "nvfp4")))
def test_a_saved_state_exports_the_same_bytes_at_any_parallelism(
    algorithm: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    quantization = QuantizationConfig(algorithm, enable_kv_cache=True)
    check_applied(checkpoint_of("llama31"), quantization, (2, 1), [(2, 1), (1, 2)], tmp_path)


# Floored amaxes, experts, tied embeddings, biases.
FAMILIES = [("nemotron", "int8_sq"), ("mixtral", "fp8"), ("gemma", "w4a8_awq"), ("starcoder2", "int8_sq")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "algorithm"), FAMILIES)
def test_saved_states_of_other_families(
    model: str, algorithm: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    layouts = [(1, 1), (1, 2, 2)] if model == "mixtral" else [(1, 1), (2, 2)]
    check_applied(checkpoint_of(model), QuantizationConfig(algorithm), (2, 1), layouts, tmp_path)


@pytest.mark.parametrize("config", [CUSTOM_FP8, LEGACY_AWQ], ids=["fp8", "awq"])
def test_the_state_of_a_modelopt_file_does_not_need_the_file(
    config: dict[str, Any], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.json", config)
    state, direct, again = (tmp_path / name for name in ("state.safetensors", "direct", "again"))
    run_ranks(calibrate_and_export, 1, checkpoint_of("llama2"), QuantizationConfig(str(file)), (1, 1), state, direct)
    file.unlink()
    run_ranks(apply_and_export, 1, checkpoint_of("llama2"), state, (1, 1), again)
    assert (again / "rank0.safetensors").read_bytes() == (direct / "rank0.safetensors").read_bytes()


def refusal(checkpoint: Path, file: Path, change: float) -> str:
    from nemo_ptq.modelopt.transfer import fingerprint
    from nemo_ptq.quantization.state import check_fits, load_state
    from tests import steps

    with steps.loaded(checkpoint) as model:
        model.module.decoder.layers[1].mlp.linear_fc2.weight.data[3, 5] += change
        try:
            check_fits(load_state(file), fingerprint(model.module))
        except PtqError as error:
            return str(error)
    return "fits"


def test_other_weights_are_refused(
    checkpoint_of: Callable[[str], Path], state_file: Callable[[str, int, int], Path]
) -> None:
    state = state_file("fp8", 1, 1)
    assert run_ranks(refusal, 1, checkpoint_of("llama2"), state, 0.0) == ["fits"]
    (message,) = run_ranks(refusal, 1, checkpoint_of("llama2"), state, 0.01)
    assert message.startswith("the calibration state was made from other weights")
    assert "\n" not in message


def test_searched_ranges_of_weights_are_not_made_up(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_config(tmp_path / "mse.json", {**CUSTOM_FP8, "algorithm": "mse"})
    state = tmp_path / "state.safetensors"
    run_ranks(calibrate_and_export, 1, checkpoint_of("llama2"), QuantizationConfig(str(file)), (1, 1), state)
    with pytest.raises(ConfigError, match="is of ModelOpt's algorithm mse, which searches the weight amaxes"):
        check_job(calibration_state=state, export_config=ExportConfig(str(tmp_path / "out")), world_size=1)


def fingerprints(checkpoint: Path, layout: tuple[int, ...]) -> set[str]:
    """The fingerprint of the whole model at once, and the one that is gathered block by block."""
    from nemo_ptq.calibration.fingerprint import Fingerprint
    from nemo_ptq.modelopt.transfer import fingerprint
    from tests import steps

    with steps.loaded(checkpoint, *layout) as model:
        whole = fingerprint(model.module)
        visitor = Fingerprint(model.parallelism.tensor.rank)
        steps.learn(model, QuantizationConfig(NO_QUANT), visitors=[visitor], drop=True)
        return {whole, visitor.whole()}


def test_the_fingerprint_is_of_the_weights_and_not_of_the_layout(checkpoint_of: Callable[[str], Path]) -> None:
    found = {
        print_
        for layout in [(1, 1), (2, 2), (1, 1, 2)]
        for prints in run_ranks(fingerprints, math.prod(layout), checkpoint_of("mixtral"), layout)
        for print_ in prints
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("checkpoint",), 7, "its checkpoint is of type int, not str"),
        (("model",), None, "its model is of type NoneType, not dict"),
        (("modelopt_config",), [], "its modelopt_config is of type list, not dict"),
        (("quantization", "algorithm"), {}, "its quantization.algorithm is of type dict, not str"),
    ],
)
def test_a_header_of_other_types_is_refused(path: tuple[str, ...], value: Any, reason: str, tmp_path: Path) -> None:
    header = StateHeader("/ckpt", "", {}, "llama", QuantizationConfig(), {}, {})
    ((key, text),) = header.to_metadata().items()
    content = json.loads(text)
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file = tmp_path / "state.safetensors"
    save_file({"x": torch.zeros(1)}, file, {key: json.dumps(content)})
    with pytest.raises(ConfigError, match=f"is of another nemo_ptq .{reason}"):
        read_header(file)


def test_a_header_says_what_was_computed_and_is_as_before_with_quality_fast() -> None:
    def content(**settings: Any) -> dict[str, Any]:
        header = StateHeader("/ckpt", "", {}, "llama", QuantizationConfig("int8_sq", **settings), {}, {})
        (text,) = header.to_metadata().values()
        return json.loads(text)["quantization"]

    fast = content(quality="fast")
    assert fast["sq_alpha"] == 0.8
    assert "quality" not in fast
    balanced = content(quality="balanced")
    assert (balanced["quality"], balanced["sq_alpha"]) == ("balanced", None)
    assert content(quality="balanced", sq_alpha=0.7)["sq_alpha"] == 0.7
