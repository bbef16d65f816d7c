# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral's layers with a mixture of experts in place of the MLP."""

from typing import Any

from nemo_ptq.models.hugging_face import FIELDS, NEMO, HuggingFaceClass, Settings, llama_like, sizes
from nemo_ptq.models.mapping import ATTENTION, EMBEDDING_RULE, LAYER, without_bias
from nemo_ptq.models.registry import Family

_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    return "MixtralConfig8x22B" if hf["hidden_size"] == 6144 else "MixtralConfig8x7B", {
        "max_position_embeddings": hf["max_position_embeddings"],
        "num_moe_experts": hf["num_local_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "make_vocab_size_divisible_by": 128,
    }


def _nemo_settings(nemo: Any) -> dict[str, Any]:
    return {
        "num_local_experts": nemo.num_moe_experts,
        "num_experts_per_tok": nemo.moe_router_topk,
        "max_position_embeddings": nemo.max_position_embeddings,
    }


MIXTRAL = HuggingFaceClass(
    architecture="MixtralForCausalLM",
    config_class="MixtralConfig",
    nemo_model=NEMO + "mixtral.MixtralModel",
    nemo_config=_nemo_config,
    nemo_settings=_nemo_settings,
    nemo_fixed=llama_like("silu"),
    defaults=sizes(32000, 4096, 14336, 32, 32, positions=131072, num_key_value_heads=8, num_local_experts=8)
    | {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu", "sliding_window": None},
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "rope_scaling": (None,), "sliding_window": (None,)},
    rules=(
        EMBEDDING_RULE,
        *without_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", LAYER + "input_layernorm"),
        *ATTENTION,
        *without_bias("decoder.layers.pre_mlp_layernorm.", LAYER + "post_attention_layernorm"),
        *without_bias("decoder.layers.mlp.router.", LAYER + "block_sparse_moe.gate"),
        *without_bias("decoder.layers.mlp.experts.experts.linear_fc1.", {"gate": _EXPERT + "w1", "up": _EXPERT + "w3"}),
        *without_bias("decoder.layers.mlp.experts.experts.linear_fc2.", _EXPERT + "w2"),
        *without_bias("decoder.final_layernorm.", "model.norm"),
    ),
)

FAMILIES = (Family("Mixtral", "Mixtral", "llama", "swiglu", MIXTRAL),)
