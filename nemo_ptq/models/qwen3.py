# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen 3: Llama's layers with norms of queries and keys; dense, or with a mixture of experts in place of the MLP."""

from typing import Any

from nemo_ptq.models.hugging_face import FIELDS, NEMO, HuggingFaceClass, Settings, llama_like, sizes
from nemo_ptq.models.llama import RULES
from nemo_ptq.models.mapping import ATTENTION, EMBEDDING_RULE, LAYER, QK_NORMS, without_bias
from nemo_ptq.models.registry import Family

_EXPERT = LAYER + "mlp.experts.{expert}."
_FIXED = llama_like("silu") | {"qk_layernorm": True}
# Values of all published models. The settings beside it describe a window that they do not use.
_SETTINGS: Settings = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
_ALLOWED = {name: (value,) for name, value in _SETTINGS.items()} | {"rope_scaling": (None,)}
_UNUSED = ("max_window_layers", "sliding_window")

QWEN3 = HuggingFaceClass(
    architecture="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    nemo_model=NEMO + "qwen3.Qwen3Model",
    nemo_config=lambda hf: ("Qwen3Config", {"vocab_size": hf["vocab_size"]}),
    nemo_settings=lambda nemo: {},
    nemo_fixed=_FIXED,
    defaults=sizes(151936, 4096, 22016, 32, 32, positions=32768, num_key_value_heads=32, head_dim=128)
    | {"rms_norm_eps": 1e-6, **_SETTINGS},
    fields=FIELDS,
    fixed=_ALLOWED,
    rules=(*RULES, *QK_NORMS),
    can_tie=True,
    harmless=_UNUSED,
    neutral={"use_qk_norm": (True,)},
    layer_types=lambda settings: ("full_attention",),
)


def _moe_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    return "Qwen3MoEConfig", {
        "vocab_size": hf["vocab_size"],
        "num_moe_experts": hf["num_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
    }


def _moe_settings(nemo: Any) -> dict[str, Any]:
    return {
        "num_experts": nemo.num_moe_experts,
        "num_experts_per_tok": nemo.moe_router_topk,
        "moe_intermediate_size": nemo.moe_ffn_hidden_size,
    }


QWEN3_MOE = HuggingFaceClass(
    architecture="Qwen3MoeForCausalLM",
    config_class="Qwen3MoeConfig",
    nemo_model=NEMO + "qwen3.Qwen3Model",
    nemo_config=_moe_config,
    nemo_settings=_moe_settings,
    nemo_fixed=_FIXED,
    defaults=sizes(151936, 2048, 6144, 24, 32, positions=32768, num_key_value_heads=4, num_experts=128)
    | {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False, "rms_norm_eps": 1e-6}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], **_SETTINGS},
    fields=FIELDS,
    # Megatron's router shares the chosen experts' weights out to one, and every layer has experts.
    fixed=_ALLOWED | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    rules=(
        EMBEDDING_RULE,
        *without_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", LAYER + "input_layernorm"),
        *ATTENTION,
        *QK_NORMS,
        *without_bias("decoder.layers.pre_mlp_layernorm.", LAYER + "post_attention_layernorm"),
        *without_bias("decoder.layers.mlp.router.", LAYER + "mlp.gate"),
        *without_bias(
            "decoder.layers.mlp.experts.experts.linear_fc1.", {"gate": _EXPERT + "gate_proj", "up": _EXPERT + "up_proj"}
        ),
        *without_bias("decoder.layers.mlp.experts.experts.linear_fc2.", _EXPERT + "down_proj"),
        *without_bias("decoder.final_layernorm.", "model.norm"),
    ),
    aliases={"num_local_experts": "num_experts"},
    can_tie=True,
    harmless=_UNUSED,
    # Of published files, and not read by transformers.
    neutral={"qkv_bias": (False,), "shared_expert_intermediate_size": (0,), "use_qk_norm": (True,)},
    layer_types=lambda settings: ("full_attention",),
)

# NeMo calls two mixtures as it calls dense models.
_MOE_CLASSES = ("Qwen3MoE", "Qwen3Config30B", "Qwen3Config235B")
FAMILIES = (
    Family("Qwen 3", "Qwen3", "qwen3", "silu", QWEN3),
    *(Family("Qwen 3 MoE", nemo_class, "qwen3_moe", "swiglu", QWEN3_MOE) for nemo_class in _MOE_CLASSES),
)
