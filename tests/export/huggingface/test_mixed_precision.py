# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Layers that a ModelOpt configuration quantizes in several ways, in one Hugging Face directory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.config import FAST, QuantizationConfig
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, transformers_logits
from tests.ranks import run_ranks

FP8 = {"num_bits": [4, 3], "axis": None}
NVFP4 = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}
CONFIG = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        *(
            {"quantizer_name": f"*{layers}*{kind}_quantizer", "cfg": rounded}
            for layers, rounded in (("self_attention.linear", FP8), ("mlp.linear", NVFP4))
            for kind in ("weight", "input")
        ),
        {"quantizer_name": "*layers.1.mlp.linear_fc2*", "enable": False},
    ],
    "algorithm": "max",
}
LAYERS = {
    **dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), "FP8"),
    **dict.fromkeys((f"mlp.{name}_proj" for name in ("gate", "up", "down")), "NVFP4"),
}
UNQUANTIZED = "model.layers.1.mlp.down_proj"


def export(checkpoint: Path, config: Path, directory: Path) -> None:
    """Exports a model in mixed precision and with each of the algorithms alone, on this rank."""
    from tests import steps

    formats = {"out": ["hf", "compressed_tensors"], "fp8": ["hf"], "nvfp4": ["hf"]}
    for name, its in formats.items():
        algorithm, quality = (str(config), None) if name == "out" else (name, FAST)
        quantization = QuantizationConfig(algorithm, quality, enable_kv_cache=False, evaluation_dataset_size=0)
        steps.run_job(steps.job_of(checkpoint, quantization, directory / name, formats=its))


@pytest.fixture(scope="module")
def exports(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixed")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    run_ranks(export, 1, checkpoint_of("llama32"), directory / "config.json", directory)
    return directory / "out"


def quantization_of(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_every_layer_is_named_with_its_algorithm(exports: Path) -> None:
    expected = {f"model.layers.{index}.{name}": algorithm for index in (0, 1) for name, algorithm in LAYERS.items()}
    del expected[UNQUANTIZED]
    found = quantization_of(exports / "hf")
    assert found["quant_algo"] == "MIXED_PRECISION" and UNQUANTIZED in found["ignore"]
    assert {name: its["quant_algo"] for name, its in found["quantized_layers"].items()} == expected
    assert all(("group_size" in its) == (its["quant_algo"] == "NVFP4") for its in found["quantized_layers"].values())
    groups = quantization_of(exports / "compressed_tensors")["config_groups"].values()
    formats = {"FP8": "float-quantized", "NVFP4": "nvfp4-pack-quantized"}
    assert {name: group["format"] for group in groups for name in group["targets"]} == {
        name: formats[algorithm] for name, algorithm in expected.items()
    }


@pytest.mark.parametrize("format", ["hf", "compressed_tensors"])
def test_it_verifies(format: str, exports: Path) -> None:
    assert [check for check in verify(exports / format) if not check.ok] == []


def test_a_layer_that_is_stored_otherwise_is_found(exports: Path) -> None:
    for format in ("hf", "compressed_tensors"):
        file = exports / format / "config.json"
        before = file.read_text()
        content = json.loads(before)
        its = content["quantization_config"]
        if format == "hf":
            del its["quantized_layers"]["model.layers.0.mlp.up_proj"]
        else:
            its["config_groups"]["group_0"]["targets"].pop()
        file.write_text(json.dumps(content))
        assert any(not check.ok for check in verify(exports / format))
        file.write_text(before)


def test_each_layer_is_stored_as_its_algorithm_alone_stores_it(exports: Path) -> None:
    mixed = load_file(exports / "hf" / "model.safetensors")
    alone = {name: load_file(exports.parent / name.lower() / "hf" / "model.safetensors") for name in ("FP8", "NVFP4")}
    checked = 0
    for name, tensor in mixed.items():
        layer = name.rpartition(".")[0]
        algorithm = LAYERS.get(".".join(layer.split(".")[3:]))
        if algorithm is not None and layer != UNQUANTIZED:
            assert torch.equal(tensor.float(), alone[algorithm][name].float()), name
            checked += 1
    assert checked == 2 * 4 * 3 + 5 * 4


def test_the_library_computes_what_the_reader_does(exports: Path, checkpoint_of: Callable[[str], Path]) -> None:
    found, report = transformers_logits(exports / "compressed_tensors", torch.bfloat16)
    assert report == {}
    original, _ = transformers_logits(checkpoint_of("llama32").with_name("llama32.hf"))
    for format in ("hf", "compressed_tensors"):
        ours = logits(exports / format, TOKENS)
        assert distance(ours, found) < 0.4  # as with NVFP4 alone: see test_compressed_formats.py
        assert 1e-3 < distance(ours, original) < 0.9
