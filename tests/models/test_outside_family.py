# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A family from one file outside the package makes a whole job."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_ptq import plugins
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.models import registry
from nemo_ptq.models.registry import class_of_architecture, family_of
from nemo_ptq.task import ptq
from nemo_ptq.verify.checks import verify
from tests.families import make_hf

PLUGIN = "tests.plugins.acorn"
SETTINGS = {
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "intermediate_size": "inner",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
    "max_position_embeddings": "context",
    "rms_norm_eps": "eps",
    "rope_theta": "theta",
    "initializer_range": "std",
    "hidden_act": "gate",
    "vocab_size": "vocab_size",
}


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Names the plugin as a user does; the family is gone afterwards."""
    monkeypatch.setenv(plugins.VARIABLE, PLUGIN)
    plugins.load_plugins.cache_clear()
    yield
    registry._registered.clear()
    sys.modules.pop(PLUGIN, None)
    plugins.load_plugins.cache_clear()


def rename(llama: Path, directory: Path) -> None:
    """Makes an Acorn of a Llama: the same model under other names."""
    directory.mkdir()
    for file in llama.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llama / "config.json").read_text())
    ours = {"architectures": ["AcornForCausalLM"], "model_type": "acorn", "dtype": settings["dtype"]}
    (directory / "config.json").write_text(json.dumps(ours | {new: settings[old] for old, new in SETTINGS.items()}))
    theirs = class_of_architecture("LlamaForCausalLM").module_names()
    tensors, renamed = load_file(llama / "model.safetensors"), {}
    for module, names in class_of_architecture("AcornForCausalLM").module_names().items():
        for rows, name in names.items():
            for layer in range(2 if "{layer}" in name else 1):
                old = theirs[module][rows].format(layer=layer)
                renamed[f"{name.format(layer=layer)}.weight"] = tensors.pop(f"{old}.weight")
    assert not tensors
    save_file(renamed, directory / "model.safetensors")


def export(source: Path, output: Path) -> bytes:
    quantization = QuantizationConfig(
        "int4_awq",
        quality="fast",
        calibration_dataset=str(source.parent / "texts.txt"),
        calibration_dataset_size=4,
        calibration_batch_size=4,
        calibration_seq_len=16,
        evaluation_dataset_size=0,
    )
    ptq(str(source), ExportConfig(str(output)), quantization_config=quantization)
    assert [check for check in verify(output) if not check.ok] == []
    return (output / "rank0.safetensors").read_bytes()


def test_a_job_of_a_family_from_outside(outside: None, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"the quick brown fox jumps {number} times\n" for number in range(8)))
    llama, acorn = make_hf("llama2", tmp_path / "llama"), tmp_path / "acorn"
    plugins.load_plugins()
    rename(llama, acorn)
    assert export(acorn, tmp_path / "of-acorn") == export(llama, tmp_path / "of-llama")


def test_it_is_found_by_both_of_its_classes_and_only_once(outside: None) -> None:
    with pytest.raises(PtqError, match="AcornConfig1B is not known"):
        family_of("AcornConfig1B")
    plugins.load_plugins()
    family = family_of("AcornConfig1B")
    assert (family.name, family.decoder) == ("Acorn", "llama")
    assert class_of_architecture("AcornForCausalLM") is family.hugging_face
    with pytest.raises(PtqError, match="nemo_class Acorn, which is that of Acorn"):
        registry.register(family)
