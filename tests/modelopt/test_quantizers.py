# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What the user's settings become in ModelOpt, and what they do to a model."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.algorithms import ALGORITHMS
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint
from tests.ranks import run_ranks

QUANTIZED = [name for name, algorithm in ALGORITHMS.items() if algorithm.needs_data]
# FP8, but for one layer's output projection and all output layers; as JSON and YAML have it.
CUSTOM_FP8: dict[str, Any] = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": [4, 3], "axis": None}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": [4, 3], "axis": None}},
        {"quantizer_name": "*output_layer*", "enable": False},
        {"quantizer_name": "*layers.1.self_attention.linear_proj*", "enable": False},
    ],
    "algorithm": "max",
}
# The form that ModelOpt had before.
LEGACY_AWQ: dict[str, Any] = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 64, "type": "static"}, "enable": True},
        "*input_quantizer": {"enable": False},
        "*output_layer*": {"enable": False},
        "default": {"enable": False},
    },
    "algorithm": "awq_lite",
}
INT8_WEIGHTS_ONLY: dict[str, Any] = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*output_layer*", "enable": False},
    ],
    "algorithm": "max",
}


def plain(config: Any) -> Any:
    """ModelOpt's configuration as built-in types."""
    if hasattr(config, "model_dump"):
        return plain(config.model_dump(exclude_unset=True))
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return [plain(item) for item in config] if isinstance(config, list) else config


def configs(cases: list[tuple[QuantizationConfig, str]]) -> list[dict[str, Any]]:
    from nemo_ptq.modelopt.quantizers import modelopt_config

    return [plain(modelopt_config(*case)) for case in cases]


def presets_changed() -> list[str]:
    """Makes every configuration there is, and changes it; returns the presets that differ afterwards."""
    import modelopt.torch.quantization as mtq

    from nemo_ptq.modelopt.quantizers import modelopt_config

    names = [name for name in dir(mtq) if name.endswith("_CFG")]
    before = {name: plain(getattr(mtq, name)) for name in names}
    for algorithm in QUANTIZED:
        for kv_cache in (True, False):
            config = modelopt_config(
                QuantizationConfig(algorithm, awq_block_size=64, sq_alpha=0.9, enable_kv_cache=kv_cache), "gemma"
            )
            config["quant_cfg"].clear()
            config["algorithm"] = "changed"
    return [name for name in names if plain(getattr(mtq, name)) != before[name]]


def test_presets_of_modelopt_are_left_alone() -> None:
    assert run_ranks(presets_changed, 1) == [[]]


def entry(config: dict[str, Any], quantizer: str) -> Any:
    """The last setting of a quantizer, which is the one that counts."""
    return [item for item in config["quant_cfg"] if item["quantizer_name"] == quantizer][-1]


def test_settings_reach_modelopt() -> None:
    cases = [
        (QuantizationConfig("int8_sq", sq_alpha=0.8), "llama"),
        (QuantizationConfig("int4_awq", awq_block_size=64), "llama"),
        (QuantizationConfig("w4a8_awq", awq_block_size=128), "llama"),
        (QuantizationConfig("w4a8_awq", awq_block_size=128), "gemma"),
        (QuantizationConfig("fp8"), "llama"),
        (QuantizationConfig("fp8"), "gpt"),
        (QuantizationConfig("int4_awq", enable_kv_cache=True), "gpt"),
    ]
    ((sq, awq, w4a8, gemma, fp8, gpt, awq_with_kv),) = run_ranks(configs, 1, cases)
    assert sq["algorithm"] == {"method": "smoothquant", "alpha": 0.8}
    assert awq["algorithm"] == {"method": "awq_lite", "alpha_step": 0.1}
    assert entry(awq, "*weight_quantizer")["cfg"]["block_sizes"][-1] == 64
    assert entry(w4a8, "*weight_quantizer")["cfg"][0]["block_sizes"][-1] == 128
    # Gemma's fine exponents overflow in the kernels.
    assert (w4a8["algorithm"]["alpha_step"], gemma["algorithm"]["alpha_step"]) == (0.1, 1.0)
    quantizes_kv = [
        any("bmm_quantizer" in item["quantizer_name"] and item.get("enable", True) for item in config["quant_cfg"])
        for config in (fp8, gpt, awq, awq_with_kv)
    ]
    assert quantizes_kv == [True, False, False, True]


def smoothing(checkpoint: Path, alpha: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest magnitudes of a layer's inputs and of its weight's columns, and the scale found from them."""
    from tests import steps

    with steps.loaded(checkpoint) as model:
        linear = model.module.decoder.layers[1].mlp.linear_fc2
        weight = linear.weight.float().abs().amax(0)
        inputs: list[torch.Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].abs().amax((0, 1)).float()))
        steps.calibrate(model, QuantizationConfig("int8_sq", sq_alpha=alpha))
        hook.remove()
        return torch.stack(inputs).amax(0), weight, linear.input_quantizer.pre_quant_scale.float()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_migrates_as_much_as_asked(alpha: float, checkpoint_of: Callable[[str], Path]) -> None:
    ((inputs, weight, scale),) = run_ranks(smoothing, 1, checkpoint_of("llama2"), alpha)
    torch.testing.assert_close(scale, weight ** (1 - alpha) / inputs**alpha, rtol=2**-7, atol=0.0)


def printed_by_calibration(checkpoint: Path, algorithm: str) -> str:
    """What reaches standard output while a model is calibrated with a loop that prints."""
    from nemo_ptq.calibration.forward import run_batches
    from nemo_ptq.modelopt.quantizers import calibrate
    from tests import steps

    def loop(module: torch.nn.Module) -> None:
        for _ in run_batches(module, steps.random_batches()):
            print("one batch")

    with steps.loaded(checkpoint) as model, redirect_stdout(io.StringIO()) as printed:
        calibrate(model.module, QuantizationConfig(algorithm), "llama", loop)
    return printed.getvalue()


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq"])
def test_only_the_users_loop_is_heard(algorithm: str, checkpoint_of: Callable[[str], Path]) -> None:
    (printed,) = run_ranks(printed_by_calibration, 1, checkpoint_of("llama2"), algorithm)
    assert set(printed.splitlines()) == {"one batch"}


def quantizer_facts(checkpoint: Path, quantization: QuantizationConfig) -> dict[str, Any]:
    """Of each enabled quantizer its range, and its block size where it has one."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    from tests import steps

    with steps.loaded(checkpoint) as model:
        steps.calibrate(model, quantization)
        return {
            name: (quantizer.amax.float(), (quantizer.block_sizes or {}).get(-1))
            for name, quantizer in model.module.named_modules()
            if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled
        }


def test_block_size_decides_how_many_weights_share_a_range(checkpoint_of: Callable[[str], Path]) -> None:
    for size in (64, 128):
        quantization = QuantizationConfig("int4_awq", awq_block_size=size, enable_kv_cache=False)
        (facts,) = run_ranks(quantizer_facts, 1, checkpoint_of("llama2"), quantization)
        amax, block_size = facts["decoder.layers.0.mlp.linear_fc2.weight_quantizer"]
        assert block_size == size
        assert amax.numel() == 256 * 512 // size
        assert len(facts) == 8


@pytest.mark.parametrize("algorithm", QUANTIZED)
@pytest.mark.parametrize("kv_cache", [True, False])
def test_linear_layers_are_quantized_and_nothing_else(
    algorithm: str, kv_cache: bool, checkpoint_of: Callable[[str], Path]
) -> None:
    quantization = QuantizationConfig(algorithm, enable_kv_cache=kv_cache)
    (facts,) = run_ranks(quantizer_facts, 1, checkpoint_of("llama2"), quantization)
    linears = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    kinds = ["weight_quantizer"] if algorithm == "int4_awq" else ["weight_quantizer", "input_quantizer"]
    expected = {f"{linear}.{kind}" for linear in linears for kind in kinds}
    if algorithm == "w4a8_awq":  # INT4, and then FP8
        expected = {name.replace("weight_quantizer", f"weight_quantizer.{i}") for name in expected for i in (0, 1)}
    if kv_cache:
        expected |= {f"self_attention.core_attention.{which}_bmm_quantizer" for which in "kv"}
    assert facts.keys() == {f"decoder.layers.{layer}.{name}" for layer in range(2) for name in expected}


@pytest.mark.parametrize(("algorithm", "floor"), [("fp8", 4.48), ("int8_sq", 1.27)])
def test_ranges_of_gpt_decoders_have_a_floor(
    algorithm: str, floor: float, checkpoint_of: Callable[[str], Path]
) -> None:
    smallest = {}
    for model in ("nemotron", "llama2"):
        (facts,) = run_ranks(quantizer_facts, 1, checkpoint_of(model), QuantizationConfig(algorithm))
        smallest[model] = min(float(amax) for name, (amax, _) in facts.items() if name.endswith("input_quantizer"))
    assert smallest["nemotron"] == pytest.approx(floor, rel=2**-8)
    assert smallest["llama2"] < floor


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config) if path.suffix == ".json" else yaml.safe_dump(config))
    return path


def export_custom(checkpoint: Path, file: Path, kv_cache: bool, directory: Path) -> str:
    from tests import steps

    try:
        quantization = QuantizationConfig(str(file), enable_kv_cache=kv_cache)
        steps.run_job(steps.job_of(checkpoint, quantization, directory))
    except PtqError as error:
        return str(error)
    return "exported"


def failed_checks(directory: Path) -> list[str]:
    """What the reader finds wrong."""
    return [f"{check.name}: {check.detail}" for check in verify(directory) if not check.ok]


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config.yml"])
@pytest.mark.parametrize("kv_cache", [True, False])
def test_users_may_leave_layers_out(
    name: str, kv_cache: bool, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_config(tmp_path / name, CUSTOM_FP8)
    (outcome,) = run_ranks(export_custom, 1, checkpoint_of("llama2"), file, kv_cache, tmp_path / "out")
    assert outcome == "exported"
    assert failed_checks(tmp_path / "out") == []
    found = open_checkpoint(tmp_path / "out")
    assert found.config.quantization.algorithm == "FP8"
    assert (found.config.quantization.kv_cache_algorithm == "FP8") == kv_cache
    dtypes = [found.tensor(f"transformer.layers.{layer}.attention.dense.weight").dtype for layer in range(2)]
    assert dtypes == [torch.float8_e4m3fn, torch.bfloat16]


def test_modelopts_former_format_is_understood(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_config(tmp_path / "config.json", LEGACY_AWQ)
    (outcome,) = run_ranks(export_custom, 1, checkpoint_of("llama2"), file, False, tmp_path / "out")
    assert outcome == "exported"
    assert failed_checks(tmp_path / "out") == []
    quantization = open_checkpoint(tmp_path / "out").config.quantization
    assert (quantization.algorithm, quantization.group_size) == ("W4A16_AWQ", 64)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (INT8_WEIGHTS_ONLY, "with weights of num_bits 8, axis 0 and inputs of 16 bits, by algorithm max, which is not"),
        ({"quant_cfg": [{"cfg": {}, "enable": True, "name": "*"}]}, "is not a ModelOpt config that can be exported: "),
        (
            {"quant_cfg": [{"quantizer_name": "*", "cfg": {"num_bits": -3}}]},
            "it quantizes the output of decoder.layers.0.",
        ),
        (CUSTOM_FP8 | {"algoritm": "max"}, "the key 'algoritm', which ModelOpt does not know: did you mean algorithm?"),
        ({"algorithm": "max"}, "is not a ModelOpt config"),
    ],
)
def test_configs_that_cannot_be_exported_are_refused(
    config: dict[str, Any], problem: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.json", config)
    (outcome,) = run_ranks(export_custom, 1, checkpoint_of("llama2"), file, False, tmp_path / "out")
    assert problem in outcome
    assert "\n" not in outcome


# FP8, and INT4 weights in the MLPs; SmoothQuant as ModelOpt has it.
MIXED = CUSTOM_FP8 | {
    "quant_cfg": [
        *CUSTOM_FP8["quant_cfg"],
        {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 128}}},
        {"quantizer_name": "*mlp*input_quantizer", "enable": False},
    ]
}
SMOOTHED: dict[str, Any] = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        {"quantizer_name": "*output_layer*", "enable": False},
    ],
    "algorithm": "smoothquant",
}


def refuse_custom(checkpoint: Path, file: Path, directory: Path, formats: list[str]) -> tuple[str, bool]:
    """What a job says, and whether it has run data by then."""
    from unittest.mock import patch

    from tests import steps

    ran = []
    with patch("nemo_ptq.engine.quantization.data_loop", lambda *_: lambda module: ran.append(True)):
        try:
            quantization = QuantizationConfig(str(file), enable_kv_cache=False)
            steps.run_job(steps.job_of(checkpoint, quantization, directory, formats=formats))
        except PtqError as error:
            return str(error), bool(ran)
    return "exported", bool(ran)


@pytest.mark.parametrize(
    ("config", "formats", "problem"),
    [
        (MIXED, ["trtllm"], "quantizes layers in 2 ways (fp8, int4_awq), and export_format=trtllm holds one way"),
        (SMOOTHED, ["trtllm", "hf"], "as int8_sq, which export_format=hf cannot hold: ModelOpt's unified checkpoint"),
    ],
)
def test_what_no_format_holds_is_refused_before_data_is_run(
    config: dict[str, Any], formats: list[str], problem: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.json", config)
    ((outcome, has_run),) = run_ranks(refuse_custom, 1, checkpoint_of("llama2"), file, tmp_path / "out", formats)
    assert problem in outcome and not has_run
    assert not (tmp_path / "out").exists()
