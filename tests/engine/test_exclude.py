# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Layers that stay unquantized, and a KV cache that is quantized alone: in every format, by every algorithm."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.engine.reexport import is_possible, run_reexport
from nemo_ptq.plan.files import weight_files
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.state_header import IN_EXPORT
from nemo_ptq.verify.checks import verify
from tests.ranks import run_ranks

EXCLUDE = ["*down_proj*", "0"]
# For each algorithm, its quality and the formats that hold it.
CASES = (
    ("fp8", "fast", ("trtllm", "hf", "compressed_tensors", "nemo")),
    ("int8_sq", "balanced", ("trtllm", "compressed_tensors")),
    ("int4_awq", "fast", ("trtllm", "hf", "compressed_tensors")),
    ("int4_awq", "balanced", ("trtllm", "hf")),
    ("nvfp4", "fast", ("trtllm", "hf")),
)
BATCHES = [torch.arange(64).reshape(2, 32) % 300, torch.arange(5, 37).reshape(1, 32)]


def run_all(checkpoint: Path, root: Path, cases: list[tuple[str, dict[str, Any], tuple[str, ...]]]) -> None:
    """Runs jobs one after the other in this process."""
    from tests import steps

    for name, quantization, formats in cases:
        job = steps.job_of(checkpoint, QuantizationConfig(**quantization), root / name, formats=list(formats))
        steps.run_job(job, BATCHES)


@pytest.fixture(scope="module")
def exports(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exclude")
    cases = [
        (f"{algorithm}-{quality}", {"algorithm": algorithm, "quality": quality, "exclude": EXCLUDE}, formats)
        for algorithm, quality, formats in CASES
    ]
    cases.append(("cache", {"kv_cache_only": True}, ("trtllm", "compressed_tensors")))
    run_ranks(run_all, 1, checkpoint_of("llama2"), root, cases, timeout=240.0)
    return root


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def source_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return tensors_of(checkpoint.with_name(f"{checkpoint.name}.hf"))


@pytest.mark.parametrize(("algorithm", "quality", "formats"), CASES)
def test_what_is_excluded_is_stored_as_it_was(
    algorithm: str, quality: str, formats: tuple[str, ...], exports: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    source = source_of(checkpoint_of("llama2"))
    for format in formats:
        directory = exports / f"{algorithm}-{quality}" / format
        assert [check for check in verify(directory) if not check.ok] == []
        if format == "nemo":
            continue
        config = json.loads((directory / "config.json").read_text())
        tensors = tensors_of(directory)
        if format == "trtllm":
            plain = ["0.attention.qkv", "0.attention.dense", "0.mlp.fc", "0.mlp.gate", "0.mlp.proj", "1.mlp.proj"]
            quantized = ["1.attention.qkv", "1.attention.dense", "1.mlp.fc", "1.mlp.gate"]
            prefix, excluded = "transformer.layers.", config["quantization"]["exclude_modules"]
            listed = {"*mlp.proj", *(f"{prefix}{name}" for name in plain if not name.endswith("proj"))}
            assert set(excluded) >= listed
            assert torch.equal(tensors[f"{prefix}1.mlp.proj.weight"], source["model.layers.1.mlp.down_proj.weight"])
        else:
            attention = [f"self_attn.{part}_proj" for part in "qkvo"]
            gated = ["mlp.gate_proj", "mlp.up_proj"]
            plain = [f"0.{name}" for name in (*attention, *gated, "mlp.down_proj")] + ["1.mlp.down_proj"]
            quantized = [f"1.{name}" for name in (*attention, *gated)]
            prefix, excluded = "model.layers.", config["quantization_config"]["ignore"]
            assert {f"{prefix}{name}" for name in plain} | {"lm_head"} <= set(excluded)
            assert not {f"{prefix}{name}" for name in quantized} & set(excluded)
            for name in plain:
                assert torch.equal(tensors[f"{prefix}{name}.weight"], source[f"{prefix}{name}.weight"]), name
        for name in plain:
            assert tensors[f"{prefix}{name}.weight"].dtype == torch.bfloat16
        for name in quantized:
            weight = tensors.get(f"{prefix}{name}.weight")
            assert weight is None or weight.dtype.itemsize == 1
            assert any(key.startswith(f"{prefix}{name}.w") and "scal" in key for key in tensors)


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in directory.iterdir()
        if file.suffix in (".safetensors", ".json")
    }


@pytest.mark.parametrize(("algorithm", "quality", "formats"), CASES)
def test_the_saved_calibration_gives_the_same_files(
    algorithm: str,
    quality: str,
    formats: tuple[str, ...],
    exports: Path,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    packed = [format for format in formats if format != "nemo"]
    job = check_job(
        world_size=1,
        nemo_checkpoint=str(checkpoint_of("llama2")),
        calibration_state=str(exports / f"{algorithm}-{quality}" / packed[0] / IN_EXPORT),
        export_config=ExportConfig(str(tmp_path / "out"), export_format=packed),
    )
    assert job.quantization.exclude == EXCLUDE
    assert is_possible(job, 1)
    run_reexport(job)
    for format in packed:
        assert digests(tmp_path / "out" / format) == digests(exports / f"{algorithm}-{quality}" / format)


@pytest.mark.parametrize(("algorithm", "quality", "formats"), CASES)
def test_the_plan_knows_the_sizes(
    algorithm: str, quality: str, formats: tuple[str, ...], exports: Path, checkpoint_of: Callable[[str], Path]
) -> None:
    job = check_job(
        world_size=1,
        nemo_checkpoint=str(checkpoint_of("llama2")),
        quantization_config=QuantizationConfig(algorithm, quality, exclude=EXCLUDE, calibration_dataset="builtin"),
        export_config=ExportConfig(str(exports / "new"), export_format="trtllm"),
    )
    sizes = {file.name: file for file in weight_files(job.metadata, job.decoder, job.quantization, job.export)}
    file = exports / f"{algorithm}-{quality}" / "trtllm" / "rank0.safetensors"
    assert sizes["rank0.safetensors"].exact
    assert sizes["rank0.safetensors"].bytes == file.stat().st_size


def test_a_kv_cache_alone_leaves_every_weight_as_it_was(exports: Path, checkpoint_of: Callable[[str], Path]) -> None:
    source = source_of(checkpoint_of("llama2"))
    for format in ("trtllm", "compressed_tensors"):
        assert [check for check in verify(exports / "cache" / format) if not check.ok] == []
    hugging_face = tensors_of(exports / "cache" / "compressed_tensors")
    scales = {name for name in hugging_face if name.endswith(("k_scale", "v_scale"))}
    assert scales == {f"model.layers.{layer}.self_attn.{rows}_scale" for layer in (0, 1) for rows in "kv"}
    assert hugging_face.keys() - scales == source.keys()
    assert all(torch.equal(hugging_face[name], weight) for name, weight in source.items())
    config = json.loads((exports / "cache" / "compressed_tensors" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"] == {} and config["kv_cache_scheme"]["num_bits"] == 8
    tensorrt_llm = tensors_of(exports / "cache" / "trtllm")
    assert sum(name.endswith("kv_cache_scaling_factor") for name in tensorrt_llm) == 2
    assert {tensor.dtype for tensor in tensorrt_llm.values()} == {torch.bfloat16, torch.float32}
    quantization = json.loads((exports / "cache" / "trtllm" / "config.json").read_text())["quantization"]
    assert quantization == {"quant_algo": None, "kv_cache_quant_algo": "FP8"}


def test_the_library_reads_a_kv_cache_alone(exports: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig as TheirConfig

    directory = exports / "cache" / "compressed_tensors"
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    read = TheirConfig.model_validate({key: value for key, value in config.items()})
    assert read.config_groups == {} and read.kv_cache_scheme is not None and read.kv_cache_scheme.num_bits == 8


@pytest.mark.slow
def test_experts_are_excluded_together(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    cases = [
        ("some", {"algorithm": "fp8", "exclude": ["model.layers.1.block_sparse_moe.experts.*"]}, ("trtllm", "hf")),
        ("all", {"algorithm": "int4_awq", "exclude": ["*experts*"]}, ("trtllm", "hf", "compressed_tensors")),
    ]
    run_ranks(run_all, 1, checkpoint_of("mixtral"), tmp_path, cases, timeout=240.0)
    source = source_of(checkpoint_of("mixtral"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    for case, _, formats in cases:
        for format in formats:
            assert [check for check in verify(tmp_path / case / format) if not check.ok] == []
        assert torch.equal(tensors_of(tmp_path / case / "hf")[name], source[name])
    first = tensors_of(tmp_path / "some" / "hf")[name.replace("layers.1", "layers.0")]
    assert first.dtype == torch.float8_e4m3fn


def run_over_stages(checkpoint: Path, root: Path) -> None:
    """Calibrates at PP 2, and ModelOpt a configuration of the user's own."""
    from tests import steps

    for name, algorithm in (("ours", "fp8"), ("custom", str(root / "config.json"))):
        quantization = QuantizationConfig(algorithm, enable_kv_cache=False, exclude=EXCLUDE)
        steps.run_job(steps.job_of(checkpoint, quantization, root / name, layout=(1, 2), formats="hf"), BATCHES)


def test_layers_are_counted_through_all_stages(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    rounded = {"num_bits": [4, 3], "axis": None}
    content = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": rounded},
            {"quantizer_name": "*input_quantizer", "cfg": rounded},
            {"quantizer_name": "*output_layer*", "enable": False},
        ],
        "algorithm": "max",
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    run_ranks(run_over_stages, 2, checkpoint_of("llama2"), tmp_path, timeout=240.0)
    ours, custom = (tensors_of(tmp_path / name) for name in ("ours", "custom"))
    assert ours.keys() == custom.keys()
    assert all(torch.equal(ours[name].float(), custom[name].float()) for name in ours)
    assert ours["model.layers.1.mlp.down_proj.weight"].dtype == torch.bfloat16
    assert ours["model.layers.1.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert ours["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
