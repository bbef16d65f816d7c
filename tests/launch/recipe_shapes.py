# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The true shapes of the models that have recipes, from NeMo's own config classes."""

from collections.abc import Mapping
from typing import Any

from nemo_ptq.models.spec import ModelSpec

# NeMo's config class, and the vocabulary of the model's tokenizer, by the beginning of a recipe's name.
MODELS: Mapping[str, tuple[str, int]] = {
    "gemma_2b": ("GemmaConfig2B", 256000),
    "gemma_7b": ("GemmaConfig7B", 256000),
    "llama2_7b": ("Llama2Config7B", 32000),
    "llama2_13b": ("Llama2Config13B", 32000),
    "llama2_70b": ("Llama2Config70B", 32000),
    "llama3_8b": ("Llama3Config8B", 128256),
    "llama3_70b": ("Llama3Config70B", 128256),
    "llama31_8b": ("Llama31Config8B", 128256),
    "llama31_70b": ("Llama31Config70B", 128256),
    "llama31_405b": ("Llama31Config405B", 128256),
    "llama32_1b": ("Llama32Config1B", 128256),
    "llama32_3b": ("Llama32Config3B", 128256),
    "mistral_7b": ("MistralConfig7B", 32000),
    "mixtral_8x7b": ("MixtralConfig8x7B", 32000),
    "mixtral_8x22b": ("MixtralConfig8x22B", 32000),
    "nemotron3_8b": ("Nemotron3Config8B", 256000),
    "nemotron3_22b": ("Nemotron3Config22B", 256000),
    "nemotron4_15b": ("Nemotron4Config15B", 256000),
    "nemotron4_340b": ("Nemotron4Config340B", 256000),
    "starcoder_15b": ("StarcoderConfig15B", 49152),
    "starcoder2_3b": ("Starcoder2Config3B", 49152),
    "starcoder2_7b": ("Starcoder2Config7B", 49152),
    "starcoder2_15b": ("Starcoder2Config15B", 49152),
}


def model_of(recipe: str) -> str:
    """Returns the key of a recipe's model."""
    return next(model for model in MODELS if recipe.startswith(f"{model}_"))


def true_shapes() -> dict[str, ModelSpec]:
    """Describes each model as a checkpoint of it would. Runs where NeMo is imported: on a rank."""
    from nemo.collections import llm

    return {name: _describe(getattr(llm, config), vocabulary) for name, (config, vocabulary) in MODELS.items()}


def _describe(config: Any, vocabulary: int) -> ModelSpec:
    # The class's defaults: without Transformer Engine most cannot be built.
    return ModelSpec(
        model_class="nemo.collections.llm.gpt.model.base.GPTModel",
        config_class=f"{config.__module__}.{config.__name__}",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        head_size=config.kv_channels or config.hidden_size // config.num_attention_heads,
        ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        gated_mlp=config.gated_linear_unit,
        vocab_size=vocabulary,
        num_experts=config.num_moe_experts,
        seq_length=config.seq_length,
        position_embedding_type=config.position_embedding_type,
        normalization=config.normalization,
        tied_embeddings=config.share_embeddings_and_output_weights,
    )
