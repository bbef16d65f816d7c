# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5: Llama's layers with a bias on queries, keys and values."""

from nemo_ptq.models.hugging_face import FIELDS, NEMO, HuggingFaceClass, llama_like, sizes
from nemo_ptq.models.mapping import EMBEDDING_RULE, GATED_MLP, LAYER, RMS_NORMS, SPLIT_QKV, with_bias, without_bias
from nemo_ptq.models.registry import Family

QWEN2 = HuggingFaceClass(
    architecture="Qwen2ForCausalLM",
    config_class="Qwen2Config",
    nemo_model=NEMO + "qwen2.Qwen2Model",
    # NeMo's importer unties the small models.
    nemo_config=lambda hf: ("Qwen2Config", {"vocab_size": hf["vocab_size"]}),
    nemo_settings=lambda nemo: {},
    nemo_fixed=llama_like("silu") | {"add_qkv_bias": True},
    defaults=sizes(151936, 4096, 22016, 32, 32, positions=32768, num_key_value_heads=32, rms_norm_eps=1e-6)
    | {"hidden_act": "silu", "use_sliding_window": False},
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "rope_scaling": (None,), "use_sliding_window": (False,)},
    rules=(
        EMBEDDING_RULE,
        *with_bias("decoder.layers.self_attention.linear_qkv.", SPLIT_QKV),
        *without_bias("decoder.layers.self_attention.linear_proj.", LAYER + "self_attn.o_proj"),
        *GATED_MLP,
        *RMS_NORMS,
    ),
    can_tie=True,
    # Settings of a window that published files describe and do not use.
    harmless=("max_window_layers", "sliding_window"),
    neutral={"use_mrope": (False,)},
    layer_types=lambda settings: ("full_attention",),
)

FAMILIES = (Family("Qwen 2", "Qwen2", "qwen2", "silu", QWEN2),)
