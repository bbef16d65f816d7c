# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a plan says of a configuration, a job says too: both are asked about configurations that are changed at random.

The rules are the same by construction. What comes before and after them is not: how a plan reads a checkpoint and
leaves rules out, and what the engine asks of a model that it has loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_ptq.checkpoint.huggingface.description import nemo_arguments
from nemo_ptq.checkpoint.huggingface.hf_weights import load_generation_config, load_tokenizer
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.trtllm.trtllm_config import hidden_act
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import spec_of
from nemo_ptq.plan import make_plan, plan_job
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.algorithms import ALGORITHMS
from tests.families import FAMILIES, make_hf
from tests.models.test_hf_settings import class_of, config_of
from tests.plan.mutations import changed, generation

READ = ("gemma3", "llama31", "phi3", "qwen3_moe")
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: make_hf(family, root / family) for family in READ}


# Of ModelOpt's: two that are taken, one for experts, two that are refused.
RECIPES = (
    "general/ptq/fp8_default-kv_fp8",
    "general/ptq/nvfp4_omlp_only-kv_fp8_cast",
    "general/ptq/nvfp4_experts_only-kv_fp8",
    "general/ptq/nvfp4_default-kv_none-gptq",
    "general/ptq/mxfp4_mlp_weight_only",
)
OPTIONS: Mapping[str, st.SearchStrategy[Any]] = {
    "algorithm": st.sampled_from(sorted({*ALGORITHMS, "no_quant", *RECIPES})),
    "enable_kv_cache": st.sampled_from([None, True, False]),
    "kv_cache_only": st.booleans(),
    "exclude": st.sampled_from([None, "first1", "*down_proj*", "*nothing*", "9"]),
    "awq_block_size": st.sampled_from([64, 96, 128]),
    "evaluation_dataset_size": st.sampled_from([0, 8]),
}
EXPORT: Mapping[str, st.SearchStrategy[Any]] = {
    "export_format": st.sampled_from([*FORMATS, "[hf,trtllm]"]),
    "decoder_type": st.sampled_from([None, None, "llama", "gpt", "qwen2"]),
    "dtype": st.sampled_from(["bf16", "fp16"]),
    "inference_tp": st.sampled_from([1, 2, 3]),
    "inference_pp": st.sampled_from([1, 2, 5]),
    "min_recovery": st.sampled_from([None, 0.9]),
    "server": st.sampled_from([None, "vllm", "tensorrt_llm_engines"]),
}


FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
# Of tokenizer_config.json: classes that transformers has, and classes that it has not.
TOKENIZER_CHANGES = (
    *(None, None, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizer"}),
    *({"tokenizer_class": None}, {"tokenizer_class": 7}, {"tokenizer_class": "TokenizersBackend"}),
    {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}},
    {"tokenizer_class": "LlamaTokenizerFast", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}},
)


def write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content))


def some(options: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Draws values for some options; the others are left to their defaults."""
    return st.fixed_dictionaries({}, optional=options)


def of_the_plan(arguments: Mapping[str, Any]) -> tuple[list[str], bool]:
    """The problems that a plan finds, and whether there is one at all: not of a checkpoint that cannot be read."""
    try:
        return [rule.problem for rule in plan_job(arguments, world_size=2).rules if rule.problem], True
    except ConfigError as error:
        return list(error.problems), False


def of_the_job(arguments: Mapping[str, Any]) -> list[str]:
    try:
        check_job(**arguments, world_size=2)
    except ConfigError as error:
        return list(error.problems)
    return []


@EXAMPLES
@given(
    data=st.data(), family=st.sampled_from(READ), quantization=some(OPTIONS), export=some(EXPORT), tp=st.integers(1, 3)
)
def test_plan_and_job_find_the_same_problems(
    data: st.DataObject,
    family: str,
    quantization: dict[str, Any],
    export: dict[str, Any],
    tp: int,
    directories: Mapping[str, Path],
) -> None:
    directory = directories[family]
    originals = {name: (directory / name).read_text() for name in FILES}
    if data.draw(st.booleans()):
        write(directory / "config.json", data.draw(changed(json.loads(originals["config.json"]))))
    if data.draw(st.booleans()):
        write(directory / "generation_config.json", data.draw(generation({})))
    if (change := data.draw(st.sampled_from(TOKENIZER_CHANGES))) is not None:
        write(directory / "tokenizer_config.json", json.loads(originals["tokenizer_config.json"]) | change)
    if data.draw(st.integers(0, 5)) == 5:
        (directory / data.draw(st.sampled_from(["tokenizer_config.json", "tokenizer.json"]))).unlink()
    try:
        arguments = {
            "nemo_checkpoint": str(directory),
            "quantization_config": QuantizationConfig(calibration_dataset="builtin", **quantization),
            "export_config": ExportConfig(str(directory.parent / "out"), **export),
            "calibration_tp": tp,
        }
        (planned, is_whole), found = of_the_plan(arguments), of_the_job(arguments)
        assert planned == (found if is_whole else found[: len(planned)])
        assert bool(planned) == bool(found)
        if not found:
            load_tokenizer(directory)
            load_generation_config(directory)
    finally:
        for name, text in originals.items():
            (directory / name).write_text(text)


NEMO: Mapping[str, st.SearchStrategy[Any]] = {
    "activation_func": st.sampled_from(["silu", "gelu", "openai_gelu", "squared_relu", "quick_gelu"]),
    "add_bias_linear": st.booleans(),
    "add_qkv_bias": st.booleans(),
    "gated_linear_unit": st.booleans(),
    "normalization": st.sampled_from(["RMSNorm", "LayerNorm"]),
    "num_query_groups": st.sampled_from([1, 2, 4, 8]),
    "qk_layernorm": st.booleans(),
    "rotary_percent": st.sampled_from([0.5, 1.0]),
    "seq_len_interpolation_factor": st.sampled_from([None, 2.0]),
}
TOKENIZER = SimpleNamespace(tokenizer=SimpleNamespace(save_pretrained=None))


def the_engine_refuses(format: str, model: Any, family: Any) -> bool:
    try:
        FORMATS[format].check_model(model, family, TOKENIZER)
    except PtqError:
        return True
    if FORMATS[format].is_tensorrt_llm:
        hidden_act(model, family)  # has a name for the activation
    return False


@EXAMPLES
@given(family=st.sampled_from(sorted(FAMILIES)), changes=some(NEMO), format=st.sampled_from(sorted(FORMATS)))
def test_a_plan_knows_what_the_engine_refuses_of_a_model(family: str, changes: dict[str, Any], format: str) -> None:
    config = config_of(family)
    hf_class = class_of(config)
    name, common, special = nemo_arguments(hf_class, hf_class.read(config))
    fields = {**hf_class.nemo_fixed, **common, **special, **changes}
    if fields["num_attention_heads"] % fields["num_query_groups"]:
        fields["num_query_groups"] = 1
    model = spec_of(fields, 1024, model_class=hf_class.nemo_model, config_class=name)
    plan = make_plan(
        model, QuantizationConfig("fp8", "fast", enable_kv_cache=False), ExportConfig("OUT", export_format=format)
    )
    if the_engine_refuses(format, model, family_of(name)):
        assert [rule.name for rule in plan.rules if rule.problem] != [], (family, changes, format)
