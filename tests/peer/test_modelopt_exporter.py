# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""At TP 1 every tensor equals ModelOpt's own export of the same calibrated model, bit for bit; so does config.json.

Where we differ on purpose, or ModelOpt's exporter fails, is listed here with the reason.
"""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.quantization.algorithms import ALGORITHMS
from nemo_ptq.verify.tensor_file import TensorFile
from nemo_ptq.verify.trtllm.trtllm_reader import same_bytes
from tests.conftest import Demo
from tests.families import FAMILIES, GPT_VARIANTS
from tests.matrix import Record, carries, record
from tests.ranks import run_ranks

KV_CACHE_SCALES = ("k_cache_scaling_factor", "v_cache_scaling_factor", "kv_cache_scaling_factor")

# Keys of config.json, why they may differ, and for which models (None: all).
CONFIG_DIFFERENCES: dict[str, tuple[str, set[str] | None]] = {
    "producer": ("names who wrote the file", None),
    "attn_bias": ("ModelOpt leaves it to the llama reader's default", None),
    "mlp_bias": ("ModelOpt leaves it to the llama reader's default", None),
    **dict.fromkeys(
        ("architecture", "decoder", "qwen_type", "seq_length", "moe_intermediate_size"),
        ("ModelOpt writes a Megatron model of Qwen as a Llama", {"qwen2", "qwen3", "qwen3_moe"}),
    ),
    "rotary_scaling": ("NeMo stretches the frequencies where ModelOpt does not look", {"llama31", "llama32"}),
    "hidden_act": (
        "ModelOpt writes openai-gelu, a synonym of gelu; with it the gpt reader ignores the gate of gpt_geglu",
        {"gpt", "gpt_geglu", "starcoder", "starcoder2"},
    ),
}
QUANTIZATION_DIFFERENCES = {
    "exclude_modules": "ModelOpt excludes the output layer only; ours also names what readers always exclude",
    "kv_cache_quant_algo": "ModelOpt drops the KV cache's scales for Megatron models",
    "quantized_layers": "ModelOpt adds this key to unquantized exports, which no reader can load",
}
# What ModelOpt's exporter cannot write.
MODELOPT_FAILS = {
    ("gemma", "int4_awq"): "pads an output layer that a tied model does not have",
    ("gemma", "w4a8_awq"): "pads an output layer that a tied model does not have",
    ("llama32", "int4_awq"): "pads an output layer that a tied model does not have",
    ("llama32", "w4a8_awq"): "pads an output layer that a tied model does not have",
    ("qwen3", "int4_awq"): "pads an output layer that a tied model does not have",
    ("qwen3", "w4a8_awq"): "pads an output layer that a tied model does not have",
    **{
        (model, algorithm): "knows these only as Hugging Face's classes"
        for model in ("gemma2", "gemma3")
        for algorithm in ALGORITHMS
    },
}
# ModelOpt has no name for Megatron's models of these; what it writes for its nearest has the same tensors.
NEAREST_DECODER = {"qwen2": "llama", "qwen3": "llama", "qwen3_moe": "llama"}
MODELS = ("demo", *FAMILIES, *GPT_VARIANTS)
QUICK = ("demo", "mixtral", "starcoder2")
# Experts are described for FP8 only, so that other exports of them are refused.
HELD = [name for name in ALGORITHMS if name not in FORMATS["trtllm"].refused]
CELLS = [(model, name) for model in MODELS for name in HELD if model == "demo" or carries("trtllm", model, name)]


@dataclass
class Comparison:
    """Our export against ModelOpt's.

    Attributes:
        num_tensors: How many tensors ModelOpt writes.
        num_layers: How many layers the model has.
        different: Names of tensors that are missing or not the same.
        extra: Names of tensors that only we write.
        ours: Our config.json.
        theirs: ModelOpt's config.json.
        error: Why ModelOpt could not export.
    """

    num_tensors: int = 0
    num_layers: int = 0
    different: list[str] = field(default_factory=list)
    extra: set[str] = field(default_factory=set)
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def compare(checkpoint: Path, directory: Path, algorithms: list[str]) -> dict[str, Comparison]:
    """Exports a checkpoint with every algorithm in both ways: a job of ours, and ModelOpt's calibration and export."""
    from tests import steps

    results = {}
    for algorithm in algorithms:
        quantization = QuantizationConfig(algorithm, enable_kv_cache=algorithm != NO_QUANT)
        steps.run_job(steps.job_of(checkpoint, quantization, directory / algorithm))
        with steps.loaded(checkpoint) as model:
            steps.calibrate(model, quantization)
            results[algorithm] = compare_one(model, directory / algorithm)
    return results


def compare_one(model: Any, directory: Path) -> Comparison:
    from modelopt.torch.export.model_config_export import torch_to_tensorrt_llm_checkpoint

    from tests import steps

    decoder = steps.family(model).decoder
    try:
        with torch.inference_mode(), redirect_stdout(io.StringIO()):
            ((config, theirs, _),) = torch_to_tensorrt_llm_checkpoint(
                model.module, NEAREST_DECODER.get(decoder, decoder), torch.bfloat16, inference_tensor_parallel=1
            )
    except Exception as error:
        return Comparison(error=f"{type(error).__name__}: {error}")
    ours = TensorFile(directory / "rank0.safetensors")
    return Comparison(
        num_tensors=len(theirs),
        num_layers=model.config.num_layers,
        different=[
            name
            for name, tensor in theirs.items()
            if name not in ours.header or not same_bytes(tensor, ours.tensor(name))
        ],
        extra=ours.header.keys() - theirs.keys(),
        ours=json.loads((directory / "config.json").read_text()),
        theirs=config,
    )


@pytest.fixture(scope="module")
def compared(
    demo: Demo, checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Comparison]]:
    """Compares all algorithms of a model in one process, once."""

    @cache
    def comparisons(model: str) -> dict[str, Comparison]:
        checkpoint = demo.checkpoint if model == "demo" else checkpoint_of(model)
        algorithms = [algorithm for name, algorithm in CELLS if name == model]
        return run_ranks(compare, 1, checkpoint, tmp_path_factory.mktemp(model), algorithms)[0]

    return comparisons


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("model", "algorithm"),
    [pytest.param(model, algorithm, marks=() if model in QUICK else pytest.mark.slow) for model, algorithm in CELLS],
)
def test_export_equals_modelopts(
    model: str,
    algorithm: str,
    compared: Callable[[str], dict[str, Comparison]],
    record_property: Record,
) -> None:
    comparison = compared(model)[algorithm]
    outcome = MODELOPT_FAILS.get((model, algorithm), "equal")
    record(record_property, "modelopt", model=model, algorithm=algorithm, outcome=outcome)
    if (model, algorithm) in MODELOPT_FAILS:
        assert comparison.error, "ModelOpt's exporter works now: compare with it"
        return
    assert comparison.error is None
    assert comparison.num_tensors >= 7 * comparison.num_layers
    assert not comparison.different
    layers = range(comparison.num_layers if algorithm != NO_QUANT else 0)
    names = {f"transformer.layers.{layer}.attention.{scale}" for layer in layers for scale in KV_CACHE_SCALES}
    assert comparison.extra == names

    ours, theirs = comparison.ours, comparison.theirs
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} - {"quantization"}
    assert different <= {key for key, (_, models) in CONFIG_DIFFERENCES.items() if models is None or model in models}
    ours, theirs = (
        {key: value for key, value in config["quantization"].items() if key not in QUANTIZATION_DIFFERENCES}
        for config in (ours, theirs)
    )
    assert ours == theirs
