# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama's layers with a sliding window."""

from typing import Any

from nemo_ptq.models.hugging_face import (
    FIELDS,
    NEMO,
    HuggingFaceClass,
    Settings,
    llama_like,
    sizes,
    sliding_window_fields,
    sliding_window_setting,
)
from nemo_ptq.models.llama import RULES
from nemo_ptq.models.registry import Family


def _nemo_config(hf: Settings) -> tuple[str, dict[str, Any]]:
    # NeMo's importer takes the window for the length of its sequences, and leaves that empty where there is none.
    if hf["sliding_window"] is None:
        return "MistralConfig7B", {"window_size": None, "cp_comm_type": None}
    return "MistralConfig7B", sliding_window_fields(hf)


MISTRAL = HuggingFaceClass(
    architecture="MistralForCausalLM",
    config_class="MistralConfig",
    nemo_model=NEMO + "mistral.MistralModel",
    nemo_config=_nemo_config,
    nemo_settings=sliding_window_setting,
    nemo_fixed=llama_like("silu"),
    defaults=sizes(32000, 4096, 14336, 32, 32, positions=131072, num_key_value_heads=8, sliding_window=4096)
    | {"rms_norm_eps": 1e-6, "hidden_act": "silu"},
    fields=FIELDS,
    fixed={"hidden_act": ("silu",), "rope_scaling": (None,)},
    rules=RULES,
)

FAMILIES = (Family("Mistral", "Mistral", "llama", "silu", MISTRAL),)
