# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A model family: Llama, in a Hugging Face class that has other names for everything."""

from nemo_ptq.models.hugging_face import NEMO, HuggingFaceClass, llama_like
from nemo_ptq.models.mapping import EMBEDDING, without_bias
from nemo_ptq.models.registry import Family, register

LAYER = "blocks.{layer}."

ACORN = HuggingFaceClass(
    architecture="AcornForCausalLM",
    config_class="AcornConfig",
    nemo_model=NEMO + "llama.LlamaModel",
    nemo_config=lambda hf: ("LlamaConfig", {"vocab_size": hf["vocab_size"]}),
    nemo_settings=lambda nemo: {},
    nemo_fixed=llama_like("silu"),
    defaults={"eps": 1e-6, "theta": 10000.0, "std": 0.02, "gate": "silu", "tie_word_embeddings": False},
    fields={
        "num_layers": "depth",
        "hidden_size": "width",
        "ffn_hidden_size": "inner",
        "num_attention_heads": "heads",
        "init_method_std": "std",
        "layernorm_epsilon": "eps",
        "seq_length": "context",
        "rotary_base": "theta",
    },
    fixed={"gate": ("silu",)},
    rules=(
        *without_bias(f"{EMBEDDING}.", "tokens"),
        *without_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", LAYER + "norm_1"),
        *without_bias(
            "decoder.layers.self_attention.linear_qkv.",
            {"q": LAYER + "attention.query", "k": LAYER + "attention.key", "v": LAYER + "attention.value"},
        ),
        *without_bias("decoder.layers.self_attention.linear_proj.", LAYER + "attention.out"),
        *without_bias("decoder.layers.mlp.linear_fc1.layer_norm_", LAYER + "norm_2"),
        *without_bias("decoder.layers.mlp.linear_fc1.", {"gate": LAYER + "mlp.gate", "up": LAYER + "mlp.up"}),
        *without_bias("decoder.layers.mlp.linear_fc2.", LAYER + "mlp.down"),
        *without_bias("decoder.final_layernorm.", "norm"),
    ),
    aliases={
        "num_hidden_layers": "depth",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "groups",
    },
    output_layer="unembed",
)

register(Family("Acorn", "Acorn", "llama", "silu", ACORN))
