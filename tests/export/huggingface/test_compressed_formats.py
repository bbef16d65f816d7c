# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What compressed_tensors holds beyond calibrated INT8, INT4 and static FP8: the library decodes and computes it."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, transformers_logits
from tests.families import FAMILIES
from tests.matrix import MIXTURES, Record, carries, record
from tests.ranks import run_ranks

CHECKPOINT_OF = Callable[[str], Path]
ALGORITHMS = ("w4a8_awq", "nvfp4", "fp8_dynamic", "int8_dynamic", "w4a16_nvfp4")
# Signal to noise of the weights, in dB, where nothing is folded into them.
LEAST_SQNR = {"nvfp4": 17.0, "fp8_dynamic": 29.0, "int8_dynamic": 36.0, "w4a16_nvfp4": 17.0}
# The library decodes NVFP4 to bfloat16, and computes in it.
IN_BFLOAT16 = ("nvfp4", "w4a16_nvfp4")
# Relative distance of a token's logits, in the median over tokens, between the library and the reader. What bfloat16
# changes of an activation lets it fall to another of FP4's few codes.
CLOSE = {
    "int4_awq": 1e-5,
    "w4a8_awq": 1e-5,
    "nvfp4": 0.4,
    "fp8_dynamic": 1e-5,
    "int8_dynamic": 1e-5,
    "w4a16_nvfp4": 0.1,
}
# And from those of the unquantized model, whose random weights a rounding moves far.
NEAR = {"int4_awq": 0.7, "w4a8_awq": 0.6, "nvfp4": 0.9, "fp8_dynamic": 0.25, "int8_dynamic": 0.12, "w4a16_nvfp4": 0.5}


def export_all(checkpoint: Path, algorithms: Sequence[str], tp: int, directory: Path) -> None:
    """Exports a model with several algorithms, each to ``directory / algorithm``, on this rank."""
    from tests import steps

    for algorithm in algorithms:
        quantization = QuantizationConfig(algorithm, enable_kv_cache=False, evaluation_dataset_size=0)
        output = directory / algorithm
        steps.run_job(steps.job_of(checkpoint, quantization, output, (tp, 1), formats="compressed_tensors"))


@pytest.fixture(scope="module")
def exports(checkpoint_of: CHECKPOINT_OF, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with every algorithm, and INT4."""
    directory = tmp_path_factory.mktemp("exports")
    run_ranks(export_all, 1, checkpoint_of("llama32"), [*ALGORITHMS, "int4_awq"], 1, directory)
    return directory


@pytest.fixture(scope="module")
def original(checkpoint_of: CHECKPOINT_OF) -> Path:
    """The Hugging Face directory that it comes from."""
    return checkpoint_of("llama32").with_name("llama32.hf")


def scales_for_each_token() -> Any:
    """Has the library give each token of an expert a scale, as servers do: of two dimensions it takes one for all."""
    from compressed_tensors.quantization.lifecycle import forward

    of_batches = forward.compute_dynamic_scales_and_zp

    def for_each_token(value: torch.Tensor, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if value.ndim != 2:
            return of_batches(value, *given, **named)
        scale, zero_point = of_batches(value[None], *given, **named)
        return scale[0], zero_point[0]

    return patch.object(forward, "compute_dynamic_scales_and_zp", for_each_token)


def distance_from_the_reader(directory: Path, algorithm: str, unquantized: torch.Tensor) -> float:
    """Has the library compute a directory's logits, and the reader."""
    dynamic = scales_for_each_token() if algorithm.endswith("_dynamic") else nullcontext()
    with dynamic:
        found, report = transformers_logits(directory, torch.bfloat16 if algorithm in IN_BFLOAT16 else torch.float32)
    assert report == {}, algorithm
    # The library's INT8 ends half a code further out.
    with patch.object(dq, "INT8_MAX", 127.5):
        far = distance(logits(directory, TOKENS), found)
    assert far < CLOSE[algorithm], algorithm
    assert 1e-4 < distance(found, unquantized) < NEAR[algorithm], algorithm
    return far


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_library_computes_what_the_reader_does(algorithm: str, exports: Path, original: Path) -> None:
    assert [check for check in verify(exports / algorithm) if not check.ok] == []
    print(distance_from_the_reader(exports / algorithm, algorithm, transformers_logits(original)[0]))


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILIES)
def test_of_every_family(model: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path, record_property: Record) -> None:
    algorithms = [algorithm for algorithm in ALGORITHMS if carries("compressed_tensors", model, algorithm)]
    algorithms += ["int4_awq"] if model in MIXTURES else []
    tp = 1 if model == "starcoder" else 2
    run_ranks(export_all, tp, checkpoint_of(model), algorithms, tp, tmp_path)
    unquantized, _ = transformers_logits(checkpoint_of(model).with_name(f"{model}.hf"))
    for algorithm in algorithms:
        far = distance_from_the_reader(tmp_path / algorithm, algorithm, unquantized)
        record(record_property, "compressed_tensors", model=model, algorithm=algorithm, distance=far)


@pytest.mark.parametrize("algorithm", LEAST_SQNR)
def test_decoded_weights_are_near_the_checkpoints(algorithm: str, exports: Path, original: Path) -> None:
    import transformers

    dtype = torch.bfloat16 if algorithm in IN_BFLOAT16 else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(exports / algorithm, dtype=dtype)
    model(TOKENS)  # the library decodes when it first computes
    decoded = {name: module.weight for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    expected = load_file(original / "model.safetensors")
    assert len(decoded) == 2 * 7
    for name, weight in decoded.items():
        exact = expected[f"{name}.weight"].float()
        sqnr = 10 * (exact.square().sum() / (exact - weight.float()).square().sum()).log10()
        assert LEAST_SQNR[algorithm] < sqnr < 60, name


def codes_of_the_library(weight: torch.Tensor, scale: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args = QuantizationArgs(**arguments)
    dtype = torch.float8_e4m3fn if arguments["type"] == "float" else torch.int8
    return quantize(weight, scale, torch.zeros_like(scale), args, dtype=dtype)


@pytest.mark.parametrize("algorithm", ["fp8_dynamic", "int8_dynamic", "int4_awq"])
def test_codes_are_the_librarys_own(algorithm: str, exports: Path, original: Path) -> None:
    """Of q_proj's weight, with the scales as they are stored; INT4's has a pre-quantization scale, folded before it."""
    stored = load_file(exports / algorithm / "model.safetensors")
    config = json.loads((exports / algorithm / "config.json").read_text(encoding="utf-8"))
    arguments = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    layer = "model.layers.1.self_attn.q_proj"
    weight = load_file(original / "model.safetensors")[f"{layer}.weight"].bfloat16().float()
    scale = stored[f"{layer}.weight_scale"]
    if algorithm == "int4_awq":
        state = load_file(exports / algorithm / "ptq" / "calibration.safetensors")
        smoothing = state["decoder.layers.1.self_attention.linear_qkv.input_quantizer.pre_quant_scale"]
        weight = (weight * (1.0 / smoothing)).bfloat16().float()
        assert scale.dtype == torch.bfloat16
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = ((stored[f"{layer}.weight_packed"][..., None] >> shifts & 0xF) - 8).flatten(1).to(torch.int8)
    else:
        assert scale.dtype == torch.float32
        codes = stored[f"{layer}.weight"]
    expected = codes_of_the_library(weight, scale.float(), arguments)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_global_scales_are_shared_by_layers_that_servers_fuse(exports: Path) -> None:
    stored = load_file(exports / "nvfp4" / "model.safetensors")
    for layers in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for field in ("weight_global_scale", "input_global_scale"):
            scales = {float(stored[f"model.layers.0.{layer}.{field}"]) for layer in layers}
            assert len(scales) == 1 and scales.pop() > 1
