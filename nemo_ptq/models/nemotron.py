# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 and 4: LayerNorm and a squared ReLU; the hybrid Nemotron-H is another model."""

from nemo_ptq.models.hugging_face import FIELDS, NEMO, ZERO_CENTERED, HuggingFaceClass, gpt_like, sizes
from nemo_ptq.models.mapping import ATTENTION, EMBEDDING_RULE, LAYER, LAYER_NORMS, without_bias
from nemo_ptq.models.registry import Family

NEMOTRON = HuggingFaceClass(
    architecture="NemotronForCausalLM",
    config_class="NemotronConfig",
    nemo_model=NEMO + "nemotron.NemotronModel",
    nemo_config=lambda hf: ("NemotronConfig", {}),  # the norms' weights are centred on zero on both sides
    nemo_settings=lambda nemo: {},
    nemo_fixed=gpt_like("squared_relu", bias=False) | ZERO_CENTERED,
    defaults=sizes(256000, 6144, 24576, 32, 48, positions=4096, norm_eps=1e-5, partial_rotary_factor=0.5)
    | {"initializer_range": 0.0134, "hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    fields=FIELDS | {"layernorm_epsilon": "norm_eps", "rotary_percent": "partial_rotary_factor"},
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,), "rope_scaling": (None,)},
    rules=(
        EMBEDDING_RULE,
        *ATTENTION,
        *without_bias("decoder.layers.mlp.linear_fc1.", LAYER + "mlp.up_proj"),
        *without_bias("decoder.layers.mlp.linear_fc2.", LAYER + "mlp.down_proj"),
        *LAYER_NORMS,
    ),
)

FAMILIES = (Family("Nemotron", "Nemotron", "gpt", hugging_face=NEMOTRON),)
