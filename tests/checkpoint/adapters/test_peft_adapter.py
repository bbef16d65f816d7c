# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Adapters of Hugging Face's PEFT: merged as PEFT merges them, or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_ptq.checkpoint.adapters.adapter import check_adapter
from nemo_ptq.checkpoint.adapters.peft_adapter import read_peft_adapter
from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.errors import ConfigError, PtqError
from tests.families import make_hf

TARGETS = ("q_proj", "v_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, an adapter that PEFT has saved, and the model into which PEFT has merged it in float32."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("peft")
    base = make_hf("llama31", root / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.02)
    model.save_pretrained(root / "adapter")
    merged = model.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(root / "merged")
    for file in base.glob("*token*"):
        shutil.copy(file, root / "merged")
    return base, root / "adapter", root / "merged"


def test_it_is_merged_as_peft_merges_it(directories: tuple[Path, Path, Path]) -> None:
    """The scale is a power of two here, so that the order of the factors does not show."""
    base, adapter, merged = directories
    check_adapter(adapter, base, read_metadata(base), is_hugging_face=True)
    before = {part.live_name: part.read() for part in HuggingFaceModel(base).parts}
    expected = {part.live_name: part.read() for part in HuggingFaceModel(merged).parts}
    found = {part.live_name: part.read() for part in HuggingFaceModel(base, read_peft_adapter(adapter)).parts}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    layers = {f"decoder.layers.{layer}." for layer in range(2)}
    linears = ("self_attention.linear_qkv.weight", "mlp.linear_fc2.weight")
    assert changed == {"output_layer.weight", *(layer + linear for layer in layers for linear in linears)}


def test_convert_merges_it(directories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from nemo_ptq.console.reporter import Reporter
    from nemo_ptq.engine.convert import convert

    base, adapter, merged = directories
    convert(base, tmp_path / "out", "hf", None, Reporter(False), adapter)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", merged))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def copy(adapter: Path, to: Path, **settings: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return to


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora True, which asks for more than the product of two matrices"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save \['embed_tokens'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"use_something_new": {"k": 1}}, "use_something_new"),
        ({"peft_type": "IA3"}, "peft_type 'IA3', and only LORA can be merged here"),
        ({"r": 0}, "r 0 and lora_alpha 16"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
    ],
)
def test_what_is_not_a_product_of_two_matrices_is_refused(
    directories: tuple[Path, Path, Path], tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PtqError, match=reason):
        read_peft_adapter(copy(directories[1], tmp_path / "adapter", **settings))


def test_of_another_model(directories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for name, changes, reason in (
        (
            "wide",
            {"intermediate_size": 768},
            r"of model.layers.0.mlp.down_proj.weight, and r 4; this model takes \(4, 768\)",
        ),
        (
            "short",
            {"num_layers": 1},
            "changes model.layers.1.mlp.down_proj.weight, which is no weight of a linear layer",
        ),
        ("tied", {"tie_word_embeddings": True}, "changes lm_head.weight, which is no weight of a linear layer"),
        ("deep", {"num_layers": 3}, "lacks 3 of the weights that target_modules in adapter_config.json names"),
    ):
        other = make_hf("llama31", tmp_path / name, **changes)
        with pytest.raises(PtqError, match=reason):
            check_adapter(directories[1], other, read_metadata(other), is_hugging_face=True)


def test_another_rank_than_its_own(directories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter = copy(directories[1], tmp_path / "adapter", r=8)
    with pytest.raises(PtqError, match=r"has matrices \(4, 256\) and \(1003, 4\) of lm_head.weight, and r 8"):
        check_adapter(adapter, directories[0], read_metadata(directories[0]), is_hugging_face=True)


def test_half_of_one(directories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter = copy(directories[1], tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.lm_head.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(PtqError, match=r"has only one matrix of lm_head.weight: copy or save it again"):
        read_peft_adapter(adapter)
    save_file({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)}, file)
    with pytest.raises(PtqError, match=r"holds base_model.model.model.embed_tokens.lora_embedding_A, float32"):
        read_peft_adapter(adapter)
    names = ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, file)
    assert read_peft_adapter(adapter).copies == {}
    file.unlink()
    with pytest.raises(PtqError, match=r"lacks adapter_model.safetensors; found there"):
        read_peft_adapter(adapter)


def test_whole_weights(directories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """PEFT saves the output layer beside its adapter; other weights, and tokens that were added, are refused."""
    base, adapter = directories[0], copy(directories[1], tmp_path / "adapter")
    assert list(read_peft_adapter(adapter).copies) == ["lm_head.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, rows, reason in (
        ("model.embed_tokens", 1004, r"has model.embed_tokens.weight of shape \(1004, 256\)"),
        ("model.layers.0.self_attn.o_proj", 256, "holds model.layers.0.self_attn.o_proj.weight, a whole weight"),
    ):
        changed = {**tensors, f"base_model.model.{name}.weight": torch.zeros(rows, 256)}
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(PtqError, match=reason):
            check_adapter(adapter, base, read_metadata(base), is_hugging_face=True)


def test_values_that_are_not_finite(directories: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter = directories[0], copy(directories[1], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    parts = {part.live_name: part for part in HuggingFaceModel(base, read_peft_adapter(adapter)).parts}
    with pytest.raises(PtqError, match=r"lm_head.lora_A.weight has values that are not finite"):
        parts["output_layer.weight"].read()


def test_beside_a_model_of_another_kind(directories: tuple[Path, Path, Path], demo: Any, tmp_path: Path) -> None:
    _, adapter, _ = directories
    with pytest.raises(PtqError, match="is PEFT's, which is merged into a Hugging Face directory"):
        check_adapter(adapter, demo.checkpoint, read_metadata(demo.checkpoint), is_hugging_face=False)
    with pytest.raises(ConfigError, match="is a LoRA adapter, not a model: give nemo_checkpoint="):
        read_metadata(adapter)
    with pytest.raises(PtqError, match="does not exist: give the directory of a LoRA adapter"):
        check_adapter(tmp_path / "none", demo.checkpoint, read_metadata(demo.checkpoint), is_hugging_face=False)
    with pytest.raises(PtqError, match="is neither a LoRA checkpoint of NeMo's"):
        check_adapter(tmp_path, demo.checkpoint, read_metadata(demo.checkpoint), is_hugging_face=False)
