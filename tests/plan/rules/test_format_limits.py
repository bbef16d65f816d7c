# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about export formats."""

from dataclasses import replace

import pytest

from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.rules.format_limits import (
    experts_have_a_format,
    family_has_class,
    formats_carry_algorithm,
    formats_have_parallelism,
    kv_cache_has_a_format,
    kv_cache_has_layers,
    server_loads_it,
)
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import MIXTRAL, expect


@pytest.mark.parametrize(
    ("model", "algorithm", "message"),
    [
        (MIXTRAL, "fp8", None),
        (MIXTRAL, None, None),
        (LLAMA_8B, "int4_awq", None),
        (MIXTRAL, "int4_awq", "algorithm=int4_awq cannot be exported for a mixture of experts"),
    ],
)
def test_formats_of_experts(model: ModelSpec, algorithm: str | None, message: str | None) -> None:
    expect(experts_have_a_format(algorithm, ("trtllm",), model), message)


@pytest.mark.parametrize(
    ("algorithm", "format", "message"),
    [
        ("nvfp4", "hf", None),
        ("fp8", "compressed_tensors", None),
        ("int4_awq", "hf", "export_format=hf take quantized experts in fp8 or nvfp4 or w4a16_nvfp4 only"),
        ("fp8_dynamic", "hf", "use fp8 or nvfp4 or w4a16_nvfp4 or no_quant"),
        ("int8_dynamic", "compressed_tensors", None),
        ("int4_awq", "compressed_tensors", None),
        (
            "int8_sq",
            "compressed_tensors",
            "use fp8 or int4_awq or nvfp4 or fp8_dynamic or int8_dynamic or w4a16_nvfp4 or no_quant",
        ),
    ],
)
def test_experts_in_hugging_face_formats(algorithm: str, format: str, message: str | None) -> None:
    expect(experts_have_a_format(algorithm, (format,), MIXTRAL), message)


@pytest.mark.parametrize(
    ("algorithm", "formats", "message"),
    [
        ("int8_sq", ["trtllm"], None),
        ("int8_sq", ["compressed_tensors"], None),
        ("int8_sq", ["hf"], "does not go into export_format=hf: ModelOpt's unified checkpoint has no SmoothQuant"),
        ("int8_sq", ["trtllm", "hf"], "use export_format=compressed_tensors"),
        ("w4a8_awq", ["hf"], None),
        ("w4a8_awq", ["compressed_tensors"], None),
        ("nvfp4", ["hf", "compressed_tensors"], None),
        ("fp8_dynamic", ["trtllm"], "use export_format=compressed_tensors"),
        ("int8_dynamic", ["hf"], "use export_format=compressed_tensors"),
        ("w4a16_nvfp4", ["nemo"], "use export_format=hf"),
        (None, ["trtllm", "hf", "compressed_tensors"], None),
    ],
)
def test_formats_of_algorithms(algorithm: str | None, formats: list[str], message: str | None) -> None:
    expect(formats_carry_algorithm(algorithm, formats), message)


@pytest.mark.parametrize("format", ["hf", "compressed_tensors"])
def test_a_hugging_face_format_needs_a_class_there(format: str) -> None:
    gpt = replace(LLAMA_8B, config_class="x.GPTConfig", normalization="LayerNorm")
    message = "no model class for GPT (GPTConfig); use export_format=trtllm"
    expect(family_has_class(gpt, family_of("GPTConfig"), ("trtllm", format)), message)
    assert family_has_class(gpt, family_of("GPTConfig"), ("trtllm",)) is None
    assert family_has_class(LLAMA_8B, family_of("LlamaConfig"), (format,)) is None


@pytest.mark.parametrize("format", ["hf", "compressed_tensors"])
def test_a_kv_cache_needs_layers_of_its_own_in_a_hugging_face_format(format: str) -> None:
    starcoder, llama = family_of("StarcoderConfig15B"), family_of("LlamaConfig")
    expect(kv_cache_has_layers(starcoder, "gpt", (format,), "fp8", True), "no place for its scales")
    assert kv_cache_has_layers(starcoder, "gpt", ("trtllm",), "fp8", True) is None
    assert kv_cache_has_layers(starcoder, "gpt", (format,), "fp8", None) is None
    assert kv_cache_has_layers(llama, "llama", (format,), "fp8", True) is None
    phi = family_of("Phi3ConfigMini")
    expect(kv_cache_has_layers(phi, "llama", (format,), "fp8", None), "set quantization_config.enable_kv_cache=false")
    assert kv_cache_has_layers(phi, "llama", (format,), "int8_sq", None) is None


@pytest.mark.parametrize(
    ("formats", "tp", "message"),
    [
        (["trtllm"], 2, None),
        (["trtllm", "hf"], 2, None),
        (["hf"], 1, None),
        (["hf"], 2, "inference_tp=2: the files of export_format=hf have no parallelism"),
    ],
)
def test_parallelism_is_for_formats_that_have_it(formats: list[str], tp: int, message: str | None) -> None:
    expect(formats_have_parallelism(formats, tp, 1), message)


@pytest.mark.parametrize(
    ("server", "format", "algorithm", "message"),
    [
        (None, "hf", "int4_awq", None),
        ("vllm", "hf", "fp8", None),
        ("vllm", "compressed_tensors", "fp8_dynamic", None),
        (
            "vllm",
            "hf",
            "int4_awq",
            "vLLM 0.32 refuses it: its reader of ModelOpt's format has no INT4; use",
        ),
        ("vllm", "trtllm", "fp8", "vLLM 0.32 refuses it: it reads export_format=hf or compressed_tensors"),
        ("sglang", "hf", "w4a16_nvfp4", "SGLang 0.5.23 is not known to load it; choose another format or algorithm"),
        ("vllm", "hf", "my_config.yaml", "vLLM 0.32 is not known to load it"),
    ],
)
def test_the_server_that_an_export_is_for_loads_it(
    server: str | None, format: str, algorithm: str, message: str | None
) -> None:
    family = family_of("Llama3Config8B")
    expect(server_loads_it(server, (format,), algorithm, LLAMA_8B, family, "llama", None), message)


@pytest.mark.parametrize(
    ("formats", "algorithm", "enabled", "head_size", "message"),
    [
        (("hf",), "fp8", None, 128, None),
        (("hf",), "nvfp4", True, 128, None),
        (
            ("hf",),
            "nvfp4",
            None,
            128,
            "and the KV cache is not quantized: set quantization_config.enable_kv_cache",
        ),
        (("hf", "trtllm"), "fp8", None, 128, "does not go into export_format=trtllm, whose readers have FP8 KV caches"),
        (("compressed_tensors",), "fp8", None, 128, "does not go into export_format=compressed_tensors"),
        (("nemo",), "fp8", None, 128, "does not go into export_format=nemo"),
        (("hf",), "fp8", None, 72, "has blocks of 16 of the elements of a head, of which the model has 72"),
    ],
)
def test_a_kv_cache_in_nvfp4(
    formats: tuple[str, ...], algorithm: str, enabled: bool | None, head_size: int, message: str | None
) -> None:
    model = replace(LLAMA_8B, head_size=head_size)
    expect(kv_cache_has_a_format("nvfp4", formats, algorithm, "llama", model, enabled), message)
    assert kv_cache_has_a_format("fp8", formats, algorithm, "llama", model, enabled) is None
