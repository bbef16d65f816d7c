# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""StarCoder 1: GPTBigCode, whose queries, keys and values are one layer, with learned positions."""

from typing import Any

from nemo_ptq.models.hugging_face import GELU, NEMO, HuggingFaceClass, Settings, gpt_like
from nemo_ptq.models.mapping import EMBEDDING, WeightRule, with_bias
from nemo_ptq.models.registry import Family

_LAYER = "transformer.h.{layer}."


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    # Without multi-query attention the fused projection has Megatron's order as well, with a group for each head.
    return "StarcoderConfig", {
        "ffn_hidden_size": hf["n_inner"] or 4 * hf["n_embd"],
        "num_query_groups": 1 if hf["multi_query"] else hf["n_head"],
    }


def _nemo_settings(nemo: Any) -> dict[str, Any]:
    return {"n_inner": nemo.ffn_hidden_size, "multi_query": nemo.num_query_groups == 1}


STARCODER = HuggingFaceClass(
    architecture="GPTBigCodeForCausalLM",
    config_class="GPTBigCodeConfig",
    nemo_model=NEMO + "starcoder.StarcoderModel",
    nemo_config=_nemo_config,
    nemo_settings=_nemo_settings,
    nemo_fixed=gpt_like("gelu", bias=True, positions="learned_absolute"),
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "n_positions": 1024,
        "multi_query": True,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "activation_function": GELU[0],
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    fields={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "init_method_std": "initializer_range",
        "layernorm_epsilon": "layer_norm_epsilon",
        "seq_length": "n_positions",
    },
    fixed={"activation_function": GELU, "scale_attn_weights": (True,)},
    rules=(
        WeightRule(f"{EMBEDDING}.weight", {"": "transformer.wte.weight"}),
        WeightRule("embedding.position_embeddings.weight", {"": "transformer.wpe.weight"}),
        *with_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", _LAYER + "ln_1"),
        *with_bias("decoder.layers.self_attention.linear_qkv.", _LAYER + "attn.c_attn"),
        *with_bias("decoder.layers.self_attention.linear_proj.", _LAYER + "attn.c_proj"),
        *with_bias("decoder.layers.mlp.linear_fc1.layer_norm_", _LAYER + "ln_2"),
        *with_bias("decoder.layers.mlp.linear_fc1.", _LAYER + "mlp.c_fc"),
        *with_bias("decoder.layers.mlp.linear_fc2.", _LAYER + "mlp.c_proj"),
        *with_bias("decoder.final_layernorm.", "transformer.ln_f"),
    ),
    aliases={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
)

FAMILIES = (Family("StarCoder", "Starcoder", "gpt", hugging_face=STARCODER),)
