# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The model families, and what TensorRT-LLM calls them. Supporting another family begins with one record here."""

import difflib
from dataclasses import dataclass

from nemo_ptq.errors import PtqError

# TensorRT-LLM's architecture of each decoder type.
ARCHITECTURES = {"gpt": "GPTForCausalLM", "llama": "LlamaForCausalLM", "gemma": "GemmaForCausalLM"}

# Hugging Face's classes in which queries, keys and values are one layer.
FUSED_QKV = ("GPTBigCodeForCausalLM",)


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: What users call it.
        model_class: NeMo's model class, or the beginning of its name.
        config_class: NeMo's config class, or the beginning of its name: ``LlamaConfig``, ``Llama31Config8B`` and so on
            all begin with "Llama".
        decoder: TensorRT-LLM's decoder type, None where the family cannot be exported.
        hidden_act: TensorRT-LLM's name of the activation, where it is the decoder's and not the model's to say.
        architecture: Hugging Face's model class, None where there is none.
    """

    name: str
    model_class: str
    config_class: str
    decoder: str | None
    hidden_act: str | None = None
    architecture: str | None = None


# The first match counts, so a class that is the beginning of another comes after it.
FAMILIES = (
    Family("Llama 4", "Llama4", "Llama4", None),
    Family("Llama", "Llama", "Llama", "llama", "silu", "LlamaForCausalLM"),
    Family("CodeLlama", "CodeLlama", "CodeLlama", "llama", "silu", "LlamaForCausalLM"),
    Family("Mistral", "Mistral", "Mistral", "llama", "silu", "MistralForCausalLM"),
    Family("Mixtral", "Mixtral", "Mixtral", "llama", "swiglu", "MixtralForCausalLM"),
    Family("Gemma 2", "Gemma2", "Gemma2", None),
    Family("Gemma 3", "Gemma3", "Gemma3", None),
    Family("Gemma", "Gemma", "Gemma", "gemma", "openai-gelu", "GemmaForCausalLM"),
    Family("Nemotron-H", "NemotronH", "NemotronH", None),
    Family("Nemotron", "Nemotron", "Nemotron", "gpt", architecture="NemotronForCausalLM"),
    Family("StarCoder 2", "Starcoder2", "Starcoder2", "gpt", architecture="Starcoder2ForCausalLM"),
    Family("StarCoder", "Starcoder", "Starcoder", "gpt", architecture="GPTBigCodeForCausalLM"),
    Family("GPT-OSS", "GPTOSS", "GPTOSS", None),
    Family("Falcon", "Falcon", "Falcon", None),
    Family("GPT", "GPT", "GPTConfig", "gpt"),
)

# What a class of the user's own is taken for, by the decoder type that the user gives.
_DECODER_FAMILIES = {
    "llama": Family("like Llama", "", "", "llama", "silu"),
    "gemma": Family("like Gemma", "", "", "gemma", "openai-gelu"),
    "gpt": Family("like GPT", "", "", "gpt"),
}


def unknown_to_reader(decoder: str, *, qk_norm: bool, qkv_bias: bool, linear_bias: bool) -> str | None:
    """Says what TensorRT-LLM's reader of a decoder would load and leave out of its computation, if there is anything.

    Args:
        decoder: TensorRT-LLM's decoder type.
        qk_norm: Whether the model normalises queries and keys.
        qkv_bias: Whether its query-key-value projection has a bias.
        linear_bias: Whether all of its linear layers have one.
    """
    if qk_norm:
        return (
            "qk_layernorm=True: the readers of TensorRT-LLM checkpoints ignore the norms of queries and keys, so the "
            "exported model would be another one; such models cannot be exported as trtllm"
        )
    if decoder == "llama" and qkv_bias != linear_bias:
        return (
            f"add_qkv_bias={qkv_bias} with add_bias_linear={linear_bias}: the reader of decoder llama wants a bias on "
            "the query-key-value projection and the output projection, or on neither; such models cannot be exported "
            "as trtllm"
        )
    return None


def supported_families() -> str:
    """Names the families that can be exported, for messages."""
    return ", ".join(family.name for family in FAMILIES if family.decoder)


def family_of(config_class: str, decoder: str | None = None) -> Family:
    """Finds the family of a NeMo config class.

    Args:
        config_class: Its name, e.g. "Llama31Config8B".
        decoder: The decoder type, where the user gives one: the class then need not be known.

    Raises:
        PtqError: If no family has such a class, or the family cannot be exported.

    Example:
        >>> family_of("Starcoder2Config15B").decoder
        'gpt'
    """
    for family in FAMILIES:
        if config_class.startswith(family.config_class):
            if decoder not in (None, family.decoder):
                return _DECODER_FAMILIES[decoder]
            if family.decoder is None:
                raise PtqError(
                    f"{family.name} ({config_class}) is not supported for quantization; "
                    f"supported: {supported_families()}"
                )
            return family
    if decoder is not None:
        return _DECODER_FAMILIES[decoder]
    nearest = difflib.get_close_matches(config_class, [family.config_class for family in FAMILIES], n=1, cutoff=0.3)
    hint = f" (nearest: {nearest[0]}...)" if nearest else ""
    raise PtqError(
        f"model config class {config_class} is not known{hint}; supported: {supported_families()}; "
        "for a class of your own that is like one of them, set export_config.decoder_type=llama, gpt or gemma"
    )
