# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2 and V3, which are refused; models that were distilled from them are Llamas and Qwens."""

from nemo_ptq.models.registry import Family

FAMILIES = (
    Family(
        "DeepSeek",
        "DeepSeek",
        None,
        refused="its attention works on compressed keys and values, and its layers mix experts that all tokens share "
        "with routed ones",
        refused_architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"),
    ),
    Family(
        "Moonlight",
        "Moonlight",
        None,
        refused="it is a DeepSeek V3, whose attention works on compressed keys and values",
    ),
)
