# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What compressed_tensors holds beyond calibrated INT8, INT4 and static FP8: the library decodes and computes it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, export_cells, transformers_logits
from tests.export.huggingface.test_unified import quick_first
from tests.families import FAMILIES
from tests.matrix import Record, carries, record
from tests.ranks import run_ranks

CHECKPOINT_OF = Callable[[str], Path]
ALGORITHMS = ("w4a8_awq", "nvfp4", "fp8_dynamic", "int8_dynamic", "w4a16_nvfp4")
# Signal to noise of the weights, in dB, where nothing is folded into them.
LEAST_SQNR = {"nvfp4": 17.0, "fp8_dynamic": 29.0, "int8_dynamic": 36.0, "w4a16_nvfp4": 17.0}
# Relative distance of a token's logits, in the median over tokens, between the library and the reader: in float32 but
# for NVFP4, whose weights the library decodes to bfloat16.
CLOSE = {"nvfp4": 0.1, "w4a16_nvfp4": 0.01}
# And from those of the unquantized model, whose random weights a rounding moves far.
NEAR = {"w4a8_awq": 0.6, "nvfp4": 0.9, "fp8_dynamic": 0.25, "int8_dynamic": 0.12, "w4a16_nvfp4": 0.5}


def of_the_library(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that the library has decoded, by the names of their layers."""
    return {name: module.weight for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model(TOKENS)  # it decodes when it first computes
    return of_the_library(model)


@pytest.mark.matrix
@pytest.mark.parametrize("model", quick_first(list(FAMILIES), ("llama31",)))
def test_the_library_computes_what_the_reader_does(
    model: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path, record_property: Record
) -> None:
    algorithms = [algorithm for algorithm in ALGORITHMS if carries("compressed_tensors", model, algorithm)]
    tp = 1 if model == "starcoder" else 2
    run_ranks(export_cells, tp, checkpoint_of(model), "compressed_tensors", algorithms, False, tp, tmp_path)
    original = checkpoint_of(model).with_name(f"{model}.hf")
    unquantized, _ = transformers_logits(original)
    for algorithm in algorithms:
        directory = tmp_path / algorithm
        assert [check for check in verify(directory) if not check.ok] == []
        found, report = transformers_logits(directory)
        assert report == {}, algorithm
        # The library's INT8 ends half a code further out.
        with patch.object(dq, "INT8_MAX", 127.5):
            read = logits(directory, TOKENS)
        far = distance(read, found)
        assert far < CLOSE.get(algorithm, 1e-5), algorithm
        assert 1e-4 < distance(found, unquantized) < NEAR[algorithm], algorithm
        record(record_property, "compressed_tensors", model=model, algorithm=algorithm, distance=far)


@pytest.mark.parametrize("algorithm", LEAST_SQNR)
def test_decoded_weights_are_near_the_checkpoints(algorithm: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    run_ranks(export_cells, 1, checkpoint_of("llama32"), "compressed_tensors", [algorithm], False, 1, tmp_path)
    original = load_file(checkpoint_of("llama32").with_name("llama32.hf") / "model.safetensors")
    decoded = weights_of(tmp_path / algorithm)
    assert len(decoded) == 2 * 7
    for name, weight in decoded.items():
        exact = original[f"{name}.weight"].float()
        sqnr = 10 * (exact.square().sum() / (exact - weight.float()).square().sum()).log10()
        assert LEAST_SQNR[algorithm] < sqnr < 60, name


def codes_of_the_library(weight: torch.Tensor, scale: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    args = QuantizationArgs(**arguments)
    dtype = torch.float8_e4m3fn if arguments["type"] == "float" else torch.int8
    return quantize(weight, scale, torch.zeros_like(scale), args, dtype=dtype)


@pytest.mark.parametrize("algorithm", ["fp8_dynamic", "int8_dynamic", "int4_awq"])
def test_codes_are_the_librarys_own(algorithm: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    """Of q_proj's weight, with the scales as they are stored; INT4's has a pre-quantization scale, folded before it."""
    run_ranks(export_cells, 1, checkpoint_of("llama32"), "compressed_tensors", [algorithm], False, 1, tmp_path)
    stored = load_file(tmp_path / algorithm / "model.safetensors")
    config = json.loads((tmp_path / algorithm / "config.json").read_text(encoding="utf-8"))
    arguments = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    original = load_file(checkpoint_of("llama32").with_name("llama32.hf") / "model.safetensors")
    layer = "model.layers.1.self_attn.q_proj"
    weight, scale = original[f"{layer}.weight"].bfloat16().float(), stored[f"{layer}.weight_scale"]
    if algorithm == "int4_awq":
        state = load_file(tmp_path / algorithm / "ptq" / "calibration.safetensors")
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


def test_global_scales_are_shared_by_layers_that_servers_fuse(checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    run_ranks(export_cells, 1, checkpoint_of("llama32"), "compressed_tensors", ["nvfp4"], False, 1, tmp_path)
    stored = load_file(tmp_path / "nvfp4" / "model.safetensors")
    for layers in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for field in ("weight_global_scale", "input_global_scale"):
            scales = {float(stored[f"model.layers.0.{layer}.{field}"]) for layer in layers}
            assert len(scales) == 1 and scales.pop() > 1
