# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""NeMo's own GPT, which has no class of Hugging Face's; GPT-OSS is another model, and refused."""

from nemo_ptq.models.registry import Family

FAMILIES = (
    Family("GPT", "GPTConfig", "gpt"),
    Family(
        "GPT-OSS",
        "GPTOSS",
        None,
        refused="its attention has learned sinks, and its experts have biases and clipped gates",
        refused_architectures=("GptOssForCausalLM",),
    ),
)
