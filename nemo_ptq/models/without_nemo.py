# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Common Hugging Face classes that NeMo has no model for, and what sets them apart."""

from collections.abc import Mapping

_SIDE_BY_SIDE = "its attention and its MLP work side by side on one norm's output"
_WITH_IMAGES = "it has an image encoder beside the language model"

WITHOUT_NEMO: Mapping[str, str] = {
    "BloomForCausalLM": "it tells positions by a bias on the scores (ALiBi)",
    "Cohere2ForCausalLM": _SIDE_BY_SIDE,
    "CohereForCausalLM": _SIDE_BY_SIDE,
    "GPT2LMHeadModel": "NeMo has no importer for it, whose weights are stored transposed",
    "GPTJForCausalLM": _SIDE_BY_SIDE,
    "GPTNeoXForCausalLM": "its attention and its MLP work side by side, each on the output of a norm of its own",
    "Glm4MoeForCausalLM": "it mixes an expert that all tokens share with routed ones",
    "Glm4ForCausalLM": "it rotates neighbouring elements of half of each head, and normalises what its layers return",
    "GlmForCausalLM": "it rotates neighbouring elements of half of each head",
    "GraniteForCausalLM": "it scales embeddings, attention, residuals and logits, which NeMo's models do not",
    "LlavaForConditionalGeneration": _WITH_IMAGES,
    "Mistral3ForConditionalGeneration": _WITH_IMAGES,
    "OPTForCausalLM": "NeMo has no class for its learned positions, which begin at 2",
    "Olmo2ForCausalLM": "it normalises what attention and MLP return, and not what enters them",
    "Olmo3ForCausalLM": "it normalises what attention and MLP return, and not what enters them",
    "PhiForCausalLM": _SIDE_BY_SIDE,
    "Qwen2_5_VLForConditionalGeneration": _WITH_IMAGES,
    "Qwen2MoeForCausalLM": "it mixes an expert that all tokens share with routed ones",
    "Qwen3NextForCausalLM": "most of its layers have linear attention",
    "Qwen3VLForConditionalGeneration": _WITH_IMAGES,
    "SmolLM3ForCausalLM": "some of its layers have no rotary embedding",
    "StableLmForCausalLM": "NeMo has no class for it",
}
"""Why a job refuses a class, by the class's name."""
