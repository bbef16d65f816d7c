# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A layer's modules have the shapes that Megatron builds, and say what ranks share and what comes before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.models.layers import LayerSpec, gpt_layer
from nemo_ptq.models.mapping import TRTLLM, trtllm_tensors
from nemo_ptq.models.spec import ModelSpec
from tests.export.shapes import GPT, LLAMA, MIXTRAL, SHAPES
from tests.ranks import run_ranks


def built_shapes(checkpoint: Path, tp: int) -> dict[str, Any]:
    """The shapes of the parameters that Megatron builds of the first layer, and our description of it."""
    from nemo_ptq.models.spec import spec_of
    from tests import steps

    with steps.loaded(checkpoint, tp) as model:
        layer = model.module.decoder.layers[0]
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        spec = spec_of(model.config, model.vocab_size)
        modules = spec.layers[0].modules
        ours = {f"{module.name}.weight": (module.shape, module.axis) for module in modules}
        ours |= {
            f"{module.name}.bias": (module.shape[:1], 0 if module.axis == 0 else None)
            for module in modules
            if module.has_bias
        }
    return {
        "built": shapes,
        "ours": {
            name: tuple(size // tp if index == axis else size for index, size in enumerate(shape))
            for name, (shape, axis) in ours.items()
        },
    }


@pytest.mark.parametrize("name", ["mixtral", "starcoder2", "gpt_swiglu", "gemma3"])
def test_modules_are_those_that_megatron_builds(name: str, checkpoint_of: Any) -> None:
    for found in run_ranks(built_shapes, 2, checkpoint_of(name), 2):
        assert found["ours"] == found["built"]


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_tensorrt_llm_has_every_row_once(name: str) -> None:
    for module in SHAPES[name].layers[0].modules:
        held = trtllm_tensors(module, SHAPES[name].gemma is not None)
        groups = [rows for tensor in held.values() for rows in tensor]
        assert sorted(groups) == sorted(module.rows)
    assert {kind for kind in TRTLLM if "linear" in kind} >= {
        module.name for module in LLAMA.layers[0].modules if module.is_quantized
    }


def test_what_follows_a_norm() -> None:
    dense, experts = gpt_layer(LLAMA), gpt_layer(MIXTRAL)
    assert dense.after("input_layernorm") is dense["self_attention.linear_qkv"]
    assert dense.after("pre_mlp_layernorm") is dense["mlp.linear_fc1"]
    assert experts.after("pre_mlp_layernorm") is None
    assert dense.after("mlp.linear_fc1") is None


def mixed(model: ModelSpec) -> tuple[LayerSpec, ...]:
    """Every other layer has half the inner size."""
    half = gpt_layer(replace(model, ffn_hidden_size=model.ffn_hidden_size // 2))
    return tuple(half if layer % 2 else gpt_layer(model) for layer in range(model.num_layers))


def test_layers_may_differ() -> None:
    model = replace(GPT, make_layers=mixed)
    name = "decoder.layers.{}.mlp.linear_fc2"
    assert [model.module(name.format(layer)).inputs for layer in range(4)] == [64, 32, 64, 32]
    with pytest.raises(KeyError):
        model.module("decoder.layers.0.mlp.router")
