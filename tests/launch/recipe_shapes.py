# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The true shapes of the models that have recipes, from NeMo's own config classes."""

from collections.abc import Mapping
from typing import Any

from nemo_ptq.models.spec import ACTIVATIONS, NEMOTRON_H_ACTIVATION, LongRope, ModelSpec, gemma_attention, gpt_layers
from nemo_ptq.models.state_space import hybrid_layers, state_space_of

# Sizes of models that NeMo has no class for.
_MINISTRAL = {"num_layers": 36, "ffn_hidden_size": 12288, "kv_channels": 128}
_PHI4 = {"num_layers": 40, "hidden_size": 5120, "ffn_hidden_size": 17920, "num_attention_heads": 40}
_PHI4 |= {"num_query_groups": 10, "seq_length": 16384}
_PHI4_MINI: dict[str, Any] = {"num_layers": 32, "num_attention_heads": 24, "num_query_groups": 8, "seq_length": 131072}
_PHI4_MINI |= {"share_embeddings_and_output_weights": True, "long_rope": LongRope((1.0,) * 48, (2.0,) * 48, 4096, 1.19)}
# NeMo's config class, the vocabulary of the model's tokenizer, and what differs from the class, by the beginning of a
# recipe's name.
MODELS: Mapping[str, tuple[str, int] | tuple[str, int, Mapping[str, Any]]] = {
    "gemma_2b": ("GemmaConfig2B", 256000),
    "gemma_7b": ("GemmaConfig7B", 256000),
    "gemma2_2b": ("Gemma2Config2B", 256000),
    "gemma2_9b": ("Gemma2Config9B", 256000),
    "gemma2_27b": ("Gemma2Config27B", 256000),
    "gemma3_1b": ("Gemma3Config1B", 262144),
    "gemma3_4b": ("Gemma3Config4B", 262208),
    "gemma3_12b": ("Gemma3Config12B", 262208),
    "gemma3_27b": ("Gemma3Config27B", 262208),
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
    "ministral_8b": ("MistralConfig7B", 131072, _MINISTRAL),
    "mistral_7b": ("MistralConfig7B", 32000),
    "mistral_nemo_12b": ("MistralNeMoConfig12B", 131072),
    "mistral_small3_24b": ("MistralSmall3Config24B", 131072),
    "mixtral_8x7b": ("MixtralConfig8x7B", 32000),
    "mixtral_8x22b": ("MixtralConfig8x22B", 32000),
    "nemotron3_8b": ("Nemotron3Config8B", 256000),
    "nemotron3_22b": ("Nemotron3Config22B", 256000),
    "nemotron4_15b": ("Nemotron4Config15B", 256000),
    "nemotron4_340b": ("Nemotron4Config340B", 256000),
    "nemotron_h_4b": ("NemotronHConfig4B", 131072),
    "nemotron_h_8b": ("NemotronHConfig8B", 131072),
    "nemotron_h_47b": ("NemotronHConfig47B", 131072),
    "nemotron_h_56b": ("NemotronHConfig56B", 131072),
    "nemotron_nano2_9b": ("NemotronNano9Bv2", 131072),
    "nemotron_nano2_12b": ("NemotronNano12Bv2", 131072),
    "phi3_mini": ("Phi3ConfigMini", 32064),
    "phi4_14b": ("Phi3ConfigMini", 100352, _PHI4),
    "phi4_mini": ("Phi3ConfigMini", 200064, _PHI4_MINI),
    "qwen25_500m": ("Qwen25Config500M", 151936),
    "qwen25_1p5b": ("Qwen25Config1P5B", 151936),
    "qwen25_3b": ("Qwen25Config3B", 151936),
    "qwen25_7b": ("Qwen25Config7B", 152064),
    "qwen25_14b": ("Qwen25Config14B", 152064),
    "qwen25_32b": ("Qwen25Config32B", 152064),
    "qwen25_72b": ("Qwen25Config72B", 152064),
    "qwen3_600m": ("Qwen3Config600M", 151936),
    "qwen3_1p7b": ("Qwen3Config1P7B", 151936),
    "qwen3_4b": ("Qwen3Config4B", 151936),
    "qwen3_8b": ("Qwen3Config8B", 151936),
    "qwen3_14b": ("Qwen3Config14B", 151936),
    "qwen3_32b": ("Qwen3Config32B", 151936),
    "qwen3_30b_a3b": ("Qwen3Config30B_A3B", 151936),
    "qwen3_235b_a22b": ("Qwen3Config235B_A22B", 151936),
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
    from nemo.collections.llm.gpt.model import ssm  # NeMo's package does not have all of these

    def class_of(name: str) -> Any:
        return getattr(llm, name, None) or getattr(ssm, name)

    return {name: _describe(class_of(config), *rest) for name, (config, *rest) in MODELS.items()}


def _describe(nemo_class: Any, vocabulary: int, differences: Mapping[str, Any] | None = None) -> ModelSpec:
    # The class's defaults: without Transformer Engine most cannot be built.
    config = type("_", (nemo_class,), dict(differences or {}))
    fields = {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}
    state_space = state_space_of(fields)
    return ModelSpec(
        model_class="nemo.collections.llm.gpt.model.base.GPTModel",
        config_class=f"{nemo_class.__module__}.{nemo_class.__name__}",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        head_size=config.kv_channels or config.hidden_size // config.num_attention_heads,
        ffn_hidden_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        gated_mlp=config.gated_linear_unit,
        activation=_activation(config.activation_func),
        vocab_size=vocabulary,
        num_experts=config.num_moe_experts,
        seq_length=config.seq_length,
        position_embedding_type=config.position_embedding_type,
        normalization=config.normalization,
        tied_embeddings=config.share_embeddings_and_output_weights,
        qkv_bias=config.add_bias_linear or getattr(config, "add_qkv_bias", False),
        linear_bias=config.add_bias_linear,
        qk_norm=config.qk_layernorm or hasattr(config, "interleaved_attn_pattern"),
        gemma=gemma_attention(fields),
        long_rope=fields.get("long_rope"),
        state_space=state_space,
        make_layers=gpt_layers if state_space is None else hybrid_layers,
    )


def _activation(function: Any) -> str:
    is_of_nemotron_h = function.__qualname__.endswith(NEMOTRON_H_ACTIVATION)
    return "squared-relu" if is_of_nemotron_h else ACTIVATIONS[function.__name__]
