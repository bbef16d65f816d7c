# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Damage to a Hugging Face directory is found, and said in the check that it belongs to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import open_model
from tests.export.hugging_face import export_cells
from tests.ranks import run_ranks

FORMATS = ("hf", "compressed_tensors")
DOWN = "model.layers.1.mlp.down_proj."


@pytest.fixture(scope="module")
def exports(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama in FP8, in both formats."""
    root = tmp_path_factory.mktemp("exports")
    for format in FORMATS:
        run_ranks(export_cells, 1, checkpoint_of("llama31"), format, ["fp8"], True, 1, root / format)
    return {format: root / format / "fp8" for format in FORMATS}


def failed(directory: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(directory) if not check.ok}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("format", FORMATS)
def test_a_sound_directory_passes(format: str, exports: dict[str, Path]) -> None:
    assert failed(exports[format]) == {}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        (lambda t: t.pop(DOWN + "weight"), "tensors", f"{DOWN}weight is missing"),
        (lambda t: t.pop(DOWN + "input_scale"), "tensors", f"{DOWN}input_scale is missing"),
        (lambda t: t.update(spare=torch.ones(1)), "tensors", "spare is not expected"),
        (lambda t: t.update({DOWN + "weight": t[DOWN + "weight"].float()}), "tensors", f"{DOWN}weight is ('F32'"),
        (lambda t: t[DOWN + "weight_scale"].zero_(), "values", f"{DOWN}weight_scale has scales that are not positive"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "values", "model.norm.weight has values that are not"),
    ],
)
def test_damaged_tensors(
    format: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    check: str,
    detail: str,
    exports: dict[str, Path],
    tmp_path: Path,
) -> None:
    directory = Path(shutil.copytree(exports[format], tmp_path / "out"))
    rewrite(directory, change)
    assert detail in failed(directory)[check]
    assert "checksums" in failed(directory)


def quantization(content: dict[str, Any]) -> dict[str, Any]:
    return content["quantization_config"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda c: quantization(c).update(quant_method="magic"), "quant_method 'magic' is not known"),
        (lambda c: c.update(num_hidden_layers=3), "model.layers.2"),
        (lambda c: c.update(num_key_value_heads=2), "k_proj.weight is"),
        (lambda c: c.update(architectures=["MistralForCausalLM"]), "architectures is ['MistralForCausalLM']"),
        (lambda c: c.update(vocab_size=5), "model.embed_tokens.weight is"),
        (lambda c: c.pop("quantization_config"), "is not expected"),
    ],
)
def test_damaged_configuration(
    format: str, change: Callable[[dict[str, Any]], None], detail: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(exports[format], tmp_path / "out"))
    edit(directory / "config.json", change)
    found = failed(directory)
    assert any(detail in found.get(check, "") for check in ("config.json", "tensors")), found


def test_the_two_documents_of_the_unified_format_agree(exports: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exports["hf"], tmp_path / "out"))
    edit(directory / "hf_quant_config.json", lambda content: content["quantization"].update(exclude_modules=[]))
    assert "exclude_modules" in failed(directory)["config.json"]
    edit(directory / "hf_quant_config.json", lambda content: content["producer"].update(name="me"))
    assert "the producer is 'me', expected 'modelopt'" in failed(directory)["config.json"]
    (directory / "hf_quant_config.json").unlink()
    assert "hf_quant_config.json" in failed(directory)["config.json"]


NO_DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "is of architecture 'x', not one of": lambda c: c.update(architectures="x"),
    "config.json: quantization_config is 'x', expected an object": lambda c: c.update(quantization_config="x"),
    "config.json: a group of config_groups is [], expected an object": lambda c: quantization(c).update(
        config_groups={"group_0": []}
    ),
    "config.json: weights of a group is [1], expected an object": lambda c: quantization(c)["config_groups"][
        "group_0"
    ].update(weights=[1]),
    "does not describe a model that can be run (TypeError: unhashable": lambda c: c.update(hidden_act=["silu"]),
}


@pytest.mark.parametrize("said", NO_DESCRIPTIONS)
def test_what_describes_no_model_is_refused_in_a_line(said: str, exports: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exports["compressed_tensors"], tmp_path / "out"))
    edit(directory / "config.json", NO_DESCRIPTIONS[said])
    with pytest.raises(PtqError) as caught:
        open_model(directory)
    assert said in str(caught.value)


def test_a_stray_file_and_a_lost_tokenizer(exports: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(exports["hf"], tmp_path / "out"))
    shutil.copy(directory / "model.safetensors", directory / "model-00001-of-00001.safetensors")
    assert "model-00001-of-00001.safetensors is in no index" in failed(directory)["tensors"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    assert {"tokenizer", "config.json"} & failed(directory).keys()
