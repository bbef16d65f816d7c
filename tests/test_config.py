# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The two configs mean what they say, and the table of options says the same as they do."""

import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_ptq.config import CUSTOM, DataSource, ExportConfig, QuantizationConfig, absolute_sources, read_sources
from nemo_ptq.options import EXPORT_OPTIONS, OPTIONS, QUANTIZATION_OPTIONS, TASK_OPTIONS, describe_options
from nemo_ptq.quantization.algorithms import ALGORITHMS, algorithm_of, kv_cache_is_quantized
from nemo_ptq.task import ptq


@pytest.mark.parametrize(
    ("algorithm", "name", "file"),
    [(name, name, None) for name in ALGORITHMS]
    + [(None, "no_quant", None), ("my/config.json", CUSTOM, "my/config.json"), ("MY.YAML", CUSTOM, "MY.YAML")],
)
def test_algorithm_has_a_name_or_a_file(algorithm, name, file):
    config = QuantizationConfig(algorithm)
    assert config.algorithm_name == name
    assert config.algorithm_file == (file and Path(file))
    assert config.algorithm == algorithm  # what the user gave is kept


@pytest.mark.parametrize(
    ("algorithm", "enable", "decoder", "expected"),
    [
        ("fp8", None, "llama", True),
        ("fp8", None, "gemma", True),
        ("fp8", None, "gpt", False),
        ("fp8", True, "gpt", True),
        ("fp8", False, "llama", False),
        ("int8_sq", None, "llama", False),
        ("int8_sq", True, "llama", True),
        ("int4_awq", None, "llama", False),
        ("no_quant", None, "llama", False),
        (None, None, "llama", False),
        ("config.json", None, "llama", False),
    ],
)
def test_kv_cache_is_on_by_default_for_fp8_only(algorithm, enable, decoder, expected):
    assert kv_cache_is_quantized(QuantizationConfig(algorithm, enable_kv_cache=enable), decoder) is expected


@pytest.mark.parametrize(
    ("algorithm", "expected"), [("int4_awq", True), ("w4a8_awq", True), ("fp8", False), (None, False), ("nvfp4", False)]
)
def test_awq_algorithms_have_blocks_of_the_users_size(algorithm, expected):
    assert algorithm_of(QuantizationConfig(algorithm)).takes_block_size is expected


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("wikitext", []),
        ("cnn_dailymail", []),
        ("owner/name:train,column=body", []),
        ("texts.jsonl", ["texts.jsonl"]),
        ("~/a.txt", [Path.home() / "a.txt"]),
        ("a.parquet,column=body,weight=2;builtin;b.txt", ["a.parquet", "b.txt"]),
    ],
)
def test_data_files_are_told_from_names(dataset, file):
    assert QuantizationConfig(calibration_dataset=dataset).data_files == list(map(Path, file))


def test_sources_have_settings():
    assert read_sources("a.jsonl") == (DataSource("a.jsonl"),)
    assert read_sources("own.er/na-me:train_sft,column=messages,config=en,weight=0.5; builtin") == (
        DataSource("own.er/na-me", "train_sft", "en", "messages", 0.5),
        DataSource("builtin"),
    )
    assert read_sources("a,weigth=2.jsonl") == (DataSource("a,weigth=2.jsonl"),)
    assert read_sources("with,comma=and:colon.txt") == (DataSource("with,comma=and:colon.txt"),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it must be one of cnn_dailymail, wikitext, builtin, OWNER/NAME"),
        ("a.txt;", "'' is not NAME[:SPLIT]"),
        ("a.txt,weight=0", "the weight in 'a.txt,weight=0' must be a number above zero"),
        ("a.txt,weight=nan", "the weight in "),
        ("a.txt,config=en", "'a.txt,config=en' is a local file, which has no config"),
        ("builtin,column=text", "'builtin' takes no column and no config: name a data set of the hub as OWNER/NAME"),
        ("a.txt,column=", "'a.txt,column=' is not NAME[:SPLIT]"),
        ("owner/name,colum=text", "colum is not a setting of a data set: it must be column, config or weight"),
        ("/data/a.jsonl,weigth=2", "weigth is not a setting of a data set: it must be column, config or weight"),
        ("owner/name,split=test", "it must be column, config or weight; a split stands behind the name, as in OWNER/"),
        ("https://host/a.jsonl", "'https://host/a.jsonl' is an address: download the file, and give its path"),
        ("owner/name:", "'owner/name:' is no name on the Hugging Face hub: write OWNER/NAME, or OWNER/NAME:SPLIT"),
    ],
)
def test_sources_that_are_not_sound(text, reason):
    with pytest.raises(ValueError):
        read_sources(text)
    problem = OPTIONS["quantization_config.calibration_dataset"].kind.problem("calibration_dataset", text)
    assert problem.startswith(f"calibration_dataset={text} is not valid: ")
    assert reason in problem


def test_files_of_sources_are_made_absolute():
    assert absolute_sources("a.txt,weight=2;builtin") == f"{Path.cwd() / 'a.txt'},weight=2;builtin"


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", "bfloat16"), ("16", "float16"), (16, "float16")])
def test_dtype_has_torchs_name(dtype, expected):
    assert ExportConfig("out", dtype=dtype).torch_dtype_name == expected


@pytest.mark.parametrize(
    ("options", "config"), [(QUANTIZATION_OPTIONS, QuantizationConfig), (EXPORT_OPTIONS, ExportConfig)]
)
def test_options_are_the_fields_of_the_configs(options, config):
    defaults = {field.name: None if field.default is MISSING else field.default for field in fields(config)}
    assert {name: option.default for name, option in options.items()} == defaults


def test_options_are_the_arguments_of_the_task():
    arguments = inspect.signature(ptq).parameters
    configs = {"quantization_config", "export_config"}
    assert {name: option.default for name, option in TASK_OPTIONS.items()} == {
        name: parameter.default for name, parameter in arguments.items() if name not in configs
    }
    assert configs <= arguments.keys()


@pytest.mark.parametrize("name", ["export_config.path", "nemo_checkpoint", "tracking"])
@pytest.mark.parametrize("value", ["a\udcff", "a\0b"])
def test_text_that_no_file_can_hold_is_refused(name, value):
    problem = OPTIONS[name].kind.problem(name, value)
    assert problem.startswith(f"{name}={value!r} is not valid: it must be a ")
    assert problem.endswith(", in UTF-8")


def test_defaults_are_valid():
    for name, option in OPTIONS.items():
        if name != "export_config.path":
            assert option.kind.problem(name, option.default) is None


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("calibration_tp", "2", 2),
        ("calibration_tp", "two", "two"),
        ("devices", "None", None),
        ("quantization_config.sq_alpha", "0.25", 0.25),
        ("quantization_config.sq_alpha", "none", None),
        ("quantization_config.quality", "balanced", "balanced"),
        ("quantization_config.enable_kv_cache", "false", False),
        ("quantization_config.enable_kv_cache", "null", None),
        ("export_config.overwrite", "yes", True),
        ("quantization_config.algorithm", "fp8", "fp8"),
    ],
)
def test_values_are_read_from_text(name, text, value):
    assert OPTIONS[name].kind.read(text) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("calibration_tp", 0),
        ("calibration_tp", True),
        ("calibration_tp", 2.0),
        ("calibration_tp", None),
        ("devices", -1),
        ("quantization_config.sq_alpha", 1.01),
        ("quantization_config.sq_alpha", float("nan")),
        ("quantization_config.quality", "best"),
        ("quantization_config.enable_kv_cache", 1),
        ("quantization_config.algorithm", ["fp8"]),
        ("quantization_config.calibration_dataset", 3),
        ("export_config.path", ""),
        ("export_config.dtype", "fp32"),
        ("forward_loop", "module.function"),
    ],
)
def test_a_wrong_value_is_told_with_its_name(name, value):
    problem = OPTIONS[name].kind.problem(name, value)
    assert problem is not None
    assert problem.startswith(f"{name}=")
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("quantization_config.algorithm", "int8sq", "int8_sq"),
        ("quantization_config.algorithm", "FP-8", "fp8"),
        ("export_config.decoder_type", "lama", "llama"),
        ("quantization_config.algorithm", "SmoothQuant", "int8_sq"),
        ("quantization_config.algorithm", "awq", "int4_awq"),
        ("export_config.export_format", "tensorrt_llm", "trtllm"),
        ("export_config.export_format", "HuggingFace", "hf"),
        ("export_config.decoder_type", "mistral", "llama"),
        ("quantization_config.calibration_dataset", "cnn_daily", "cnn_dailymail"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, value, nearest):
    assert f"did you mean {nearest}?" in OPTIONS[name].kind.problem(name, value)


@pytest.mark.parametrize("text", ["~nobody_at_all/x", "s3://bucket/x"])
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("export_config.path", ""),
        ("nemo_checkpoint", ""),
        ("tokenizer_path", ""),
        ("quantization_config.algorithm", ".yaml"),
        ("quantization_config.calibration_dataset", ".jsonl"),
    ],
)
def test_a_path_that_cannot_be_one_is_told(name, ending, text):
    reason = "there is no home directory ~nobody_at_all: write the whole path" if "~" in text else "an address"
    problem = OPTIONS[name].kind.problem(name, text + ending)
    assert problem.startswith(f"{name}=")
    assert reason in problem


def test_help_lists_every_option_within_a_terminals_width():
    text = describe_options()
    assert all(f"  {name}: " in text for name in OPTIONS)
    assert max(map(len, text.splitlines())) <= 74


def test_nemo_run_carries_the_task_to_its_ranks_unchanged():
    task = run.Partial(
        ptq,
        nemo_checkpoint="checkpoint",
        calibration_tp=2,
        quantization_config=run.Config(QuantizationConfig, algorithm="int8_sq", sq_alpha=0.7),
        export_config=run.Config(ExportConfig, path="out", overwrite=True),
    )
    serializer = ZlibJSONSerializer()
    arguments = fdl.build(serializer.deserialize(serializer.serialize(task))).keywords
    assert arguments["quantization_config"] == QuantizationConfig("int8_sq", sq_alpha=0.7)
    assert arguments["export_config"] == ExportConfig("out", overwrite=True)
    assert (arguments["nemo_checkpoint"], arguments["calibration_tp"]) == ("checkpoint", 2)
