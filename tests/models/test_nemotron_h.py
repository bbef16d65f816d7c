# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What Nemotron-H is, from its config.json or from NeMo's configuration; no weights are read."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from nemo_ptq.checkpoint.huggingface.description import settings_spec
from nemo_ptq.errors import PtqError
from nemo_ptq.models.nemotron_h import NEMOTRON_H
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import ModelSpec, spec_of
from nemo_ptq.plan.sharding import linear_parameters, model_parameters
from nemo_ptq.verify.huggingface.nemotron_h import hybrid_config
from tests.hybrids import CONFIG

# Nemotron-H 8B as NeMo has it.
NEMO = {
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "num_layers": 52,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 21504,
    "mamba_num_heads": None,
    "mamba_head_dim": 64,
    "mamba_state_dim": 128,
    "mamba_num_groups": 8,
    "seq_length": 8192,
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "share_embeddings_and_output_weights": False,
    "activation_func": {"_target_": "nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase.<lambda>"},
}


def spec(**changes: Any) -> ModelSpec:
    return settings_spec(NEMOTRON_H, NEMOTRON_H.read({**CONFIG, **changes}))


def kinds(model: ModelSpec) -> str:
    return "".join(
        next(
            kind
            for kind, name in {"M": "mixer.in_proj", "*": "self_attention.linear_qkv", "-": "mlp.linear_fc1"}.items()
            if name in layer
        )
        for layer in model.layers
    )


def test_layers_follow_the_pattern() -> None:
    model = spec()
    assert kinds(model) == CONFIG["hybrid_override_pattern"]
    assert [(len(layer.modules), count) for layer, count in model.layer_kinds] == [(6, 3), (3, 2), (3, 1)]
    assert model.module("decoder.layers.0.mixer.in_proj").rows == {"z": 512, "x": 512, "B": 32, "C": 32, "dt": 32}
    assert model.module("decoder.layers.0.mixer.conv1d").shape == (576, 1, 4)
    assert model.activation == "squared-relu"
    assert not model.has("decoder.layers.0.mlp.linear_fc1") and model.has("decoder.final_layernorm")


def test_what_is_quantized_is_linear() -> None:
    quantized = {module.name for layer in spec().layers for module in layer.modules if module.is_quantized}
    state_space = {"mixer.in_proj", "mixer.out_proj"}
    assert quantized == state_space | {
        f"{block}.linear_{name}"
        for block, names in {"self_attention": ("qkv", "proj"), "mlp": ("fc1", "fc2")}.items()
        for name in names
    }


def test_a_scale_of_what_follows_a_norm_goes_into_it() -> None:
    layer = spec().layers[0]
    followers = {norm: layer.after(norm) for norm in ("norm", "mixer.norm")}
    assert {norm: linear.name for norm, linear in followers.items() if linear} == {
        "norm": "mixer.in_proj",
        "mixer.norm": "mixer.out_proj",
    }


def test_nemos_configuration_is_the_same_model() -> None:
    model = spec_of(NEMO, 131072)
    assert kinds(model) == NEMO["hybrid_override_pattern"]
    assert model.state_space is not None and model.state_space.heads == 128
    assert model.activation == "squared-relu"
    # Published as 8.1 billion parameters.
    assert 8.0e9 < model_parameters(model) < 8.2e9
    assert linear_parameters(model) < model_parameters(model) - 2 * 131072 * 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp", "mamba"]},
        {
            "layers_block_type": [
                "linear_attention",
                "mlp",
                "linear_attention",
                "full_attention",
                "mlp",
                "linear_attention",
            ]
        },
    ],
)
def test_the_spellings_of_transformers_5_are_read(changes: Mapping[str, Any]) -> None:
    content = {**CONFIG, **changes, "head_dim": 64}
    if "layers_block_type" in changes:
        del content["hybrid_override_pattern"], content["num_hidden_layers"], content["attention_head_dim"]
    model = settings_spec(NEMOTRON_H, NEMOTRON_H.read(content))
    assert kinds(model) == CONFIG["hybrid_override_pattern"]
    verified = hybrid_config(content)
    assert verified.hybrid is not None and verified.hybrid.pattern == CONFIG["hybrid_override_pattern"]
    assert verified.head_size == model.head_size == 64


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"hybrid_override_pattern": "M-M*-E"},
            "hybrid_override_pattern is 'M-M[*]-E': it must have one of M, [*] and -",
        ),
        ({"hybrid_override_pattern": "M-"}, "hybrid_override_pattern is 'M-': .* for each of 6 layers"),
        ({"n_groups": 3}, "mamba_num_groups is 3, which does not divide 32 heads"),
        ({"ssm_state_size": 0}, "config.json has ssm_state_size 0, which is no size"),
        ({"conv_kernel": 3}, "config.json has conv_kernel 3, but NeMo's MambaModel can only have 4"),
        ({"layer_norm_epsilon": 1e-6}, "config.json has layer_norm_epsilon 1e-06"),
        ({"time_step_limit": [0.0, 0.1]}, "config.json has time_step_limit"),
        ({"mlp_hidden_act": "silu"}, "config.json has mlp_hidden_act 'silu'"),
        ({"use_bias": True}, "config.json has use_bias True"),
    ],
)
def test_what_megatron_cannot_have_is_refused(changes: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(PtqError, match=problem):
        spec(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": "M-M*-E"},
        {"num_hidden_layers": 5},
        {"time_step_limit": [0.0, 0.1]},
        {"mlp_hidden_act": "silu"},
        {"n_groups": 3},
        {"hidden_size": 2.5},
        {"secret_gate": 1},
    ],
)
def test_the_reader_refuses_what_it_does_not_compute(changes: Mapping[str, Any]) -> None:
    assert hybrid_config(CONFIG).hybrid is not None
    with pytest.raises(
        PtqError, match=f"config.json.*{'kinds of layers' if 'pattern' in next(iter(changes)) else next(iter(changes))}"
    ):
        hybrid_config({**CONFIG, **changes})


def test_the_infinity_of_published_files_is_one_of_the_limits() -> None:
    assert CONFIG["time_step_limit"] == [0.0, math.inf]


@pytest.mark.parametrize("config_class", ["NemotronHConfigBase", "NemotronHConfig56B", "NemotronNano9Bv2"])
def test_nemos_classes_are_known(config_class: str) -> None:
    assert family_of(config_class).hugging_face is NEMOTRON_H
