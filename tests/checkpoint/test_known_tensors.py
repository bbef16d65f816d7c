# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A NeMo checkpoint with weights that its model does not read is refused, and all that NeMo writes is known."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.index import read_stored
from nemo_ptq.checkpoint.known_tensors import check_complete, check_shapes, check_tensors
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.errors import PtqError
from tests.families import FAMILIES, GPT_VARIANTS

QKV = "module.decoder.layers.self_attention.linear_qkv."


def stored(checkpoint: Path) -> dict[str, str]:
    return {name: tensor.dtype for name, tensor in read_stored(checkpoint).tensors.items()}


@pytest.mark.parametrize("name", [*FAMILIES, *GPT_VARIANTS])
def test_all_weights_of_a_family_are_known(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of(name)
    model, tensors = read_metadata(checkpoint), stored(checkpoint)
    assert tensors
    check_tensors(model, tensors)
    check_complete(model, tensors)
    # Every one of them is known by its own name, and by no rule that takes any.
    for tensor in tensors:
        with pytest.raises(PtqError, match="has no place for 1 tensors"):
            check_tensors(model, {re.sub("(weight|bias)$", "other", tensor): "bfloat16"})


def test_what_is_no_weight_is_left_alone(checkpoint_of: Callable[[str], Path]) -> None:
    model = read_metadata(checkpoint_of("llama2"))
    others = {
        "optimizer.state.exp_avg.module.decoder.layers.mlp.linear_fc1.weight": "float32",
        "optimizer.state.fp32_param.module.output_layer.weight": "float32",
        f"{QKV}_extra_state/shard_0_2": "uint8",
        f"{QKV}weight_quantizer._amax": "float64",
        "lr_scheduler": "float64",
    }
    check_tensors(model, others)


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("a name for each layer", "module.decoder.layers.3.self_attention.linear_qkv.weight"),
        ("norms apart", "module.decoder.layers.input_layernorm.weight"),
        ("halves of a gate", "module.decoder.layers.0.mlp.linear_fc1.weight_v"),
    ],
)
def test_other_layouts_of_the_same_weights(name: str, spelt: str, checkpoint_of: Callable[[str], Path]) -> None:
    check_tensors(read_metadata(checkpoint_of("llama2")), {spelt: "bfloat16"})


@pytest.mark.parametrize(
    "adapter",
    [
        f"{QKV}adapter.linear_in.weight",
        f"{QKV}to_wrap.weight",
        f"{QKV}adapter.adapter_q.linear_out.weight",
        "module.decoder.layers.0.mlp.linear_fc1.lora_a.weight",
    ],
)
def test_adapters_that_are_not_merged(adapter: str, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("llama2")
    with pytest.raises(
        PtqError, match=r"1 tensors of LoRA adapters that are not merged, .*: give the model without them"
    ):
        check_tensors(read_metadata(checkpoint), {**stored(checkpoint), adapter: "bfloat16"})


def test_a_weight_without_a_place(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = checkpoint_of("llama2")
    model = read_metadata(checkpoint)
    bias, norm = f"{QKV}bias", "module.decoder.layers.self_attention.q_layernorm.weight"
    for name in (bias, norm):
        with pytest.raises(PtqError, match=r"has no place for 1 tensors of the checkpoint, module\.decoder"):
            check_tensors(model, {name: "bfloat16"})
    check_tensors(replace(model, qkv_bias=True, qk_norm=True), {bias: "bfloat16", norm: "bfloat16"})


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn"])
def test_types_that_no_weights_have(dtype: str, checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(PtqError, match=f"linear_qkv.weight of {dtype} among them"):
        check_tensors(read_metadata(checkpoint_of("llama2")), {f"{QKV}weight": dtype})


def test_weights_of_another_model_are_refused(checkpoint_of: Callable[[str], Path]) -> None:
    """By their shapes, which every family's own have; a plan knows it before anything is read."""
    checkpoint = checkpoint_of("llama2")
    model = read_metadata(checkpoint)
    shapes = {name: tensor.shape for name, tensor in read_stored(checkpoint).tensors.items()}
    check_shapes(model, shapes)
    fc1 = "module.decoder.layers.mlp.linear_fc1.weight"
    halves = {f"module.decoder.layers.1.mlp.linear_fc1.weight_{half}": (512, 256) for half in "wv"}
    check_shapes(model, halves)
    for changed, message in (
        (replace(model, num_layers=3), "has the shape .*, and the model that is described, of 3 layers, has"),
        (replace(model, ffn_hidden_size=640), r"has the shape \[2, 1024, 256\], .* has \[2, 1280, 256\] there"),
        (replace(model, hidden_size=512), "give the description of these weights"),
        (replace(model, gated_mlp=False), r"has \[2, 512, 256\] there"),
    ):
        with pytest.raises(PtqError, match=message):
            check_shapes(changed, shapes)
    with pytest.raises(PtqError, match=r"\[512, 256\], and the model that is described, of 1 layers"):
        check_shapes(replace(model, num_layers=1), halves)
    with pytest.raises(PtqError, match=r"no weights for 1 parameters of the model that is described, .*fc1"):
        check_complete(model, shapes.keys() - {fc1})
