# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Classes of Hugging Face's that many people use, and that NeMo has no model for: what sets them apart."""

from collections.abc import Mapping

WITHOUT_NEMO: Mapping[str, str] = {
    "Glm4ForCausalLM": "it rotates neighbouring elements of half of each head, and normalises what its layers return",
    "GlmForCausalLM": "it rotates neighbouring elements of half of each head",
    "GraniteForCausalLM": "it scales embeddings, attention, residuals and logits, which NeMo's models do not",
    "Olmo2ForCausalLM": "it normalises what attention and MLP return, and not what enters them",
    "PhiForCausalLM": "its attention and its MLP work side by side on one norm's output",
    "Qwen2MoeForCausalLM": "it mixes an expert that all tokens share with routed ones",
    "SmolLM3ForCausalLM": "some of its layers have no rotary embedding",
    "StableLmForCausalLM": "NeMo has no class for it",
}
"""By the class's name, why a job refuses it."""
