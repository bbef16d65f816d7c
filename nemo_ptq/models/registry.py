# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The registry of model families. Imports nothing heavy; the families' modules are imported on first use.

A family is one module, such as :mod:`nemo_ptq.models.llama`. A plugin (:mod:`nemo_ptq.plugins`) adds one of its own by
calling :func:`register` when it is imported, which must not take long: every command imports it.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import HuggingFaceClass
from nemo_ptq.models.spec import ACTIVATIONS, ModelSpec
from nemo_ptq.models.without_nemo import WITHOUT_NEMO

# TensorRT-LLM's architecture of each decoder type.
ARCHITECTURES = {
    "gpt": "GPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Those that normalise queries and keys.
_QK_NORM_DECODERS = ("qwen3", "qwen3_moe", "gemma3")
# The activation of a decoder whose MLP has a gate, in our words; for "gpt" it depends on the model.
_GATED_DECODERS = {"gemma": "gelu", "gemma2": "gelu", "gemma3": "gelu"} | dict.fromkeys(
    ("llama", "qwen2", "qwen3", "qwen3_moe"), "silu"
)
# In the order in which messages name them.
_OWN = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma",
    "starcoder",
    "starcoder2",
    "nemotron",
    "nemotron_h",
    "deepseek",
    "falcon",
    "gpt",
)


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: What users call it.
        nemo_class: The beginning of the names of NeMo's config classes: ``LlamaConfig``, ``Llama31Config8B`` and so on
            all begin with "Llama". Of several families the one with the longest beginning counts.
        decoder: TensorRT-LLM's decoder type, None where the family cannot be exported.
        hidden_act: TensorRT-LLM's name of the activation, where the decoder and not the model decides it.
        hugging_face: Hugging Face's model class, None where there is none.
        refused: Why the family cannot be quantized, None where it can.
        refused_architectures: Hugging Face's classes of a family that cannot.
    """

    name: str
    nemo_class: str
    decoder: str | None
    hidden_act: str | None = None
    hugging_face: HuggingFaceClass | None = None
    refused: str | None = None
    refused_architectures: tuple[str, ...] = ()

    @property
    def without_hugging_face(self) -> str | None:
        """Why the family cannot become a Hugging Face directory, None where it can."""
        if self.hugging_face is None:
            return f"Hugging Face has no model class for {self.name}"
        return None


# Families of plugins, by NeMo's class.
_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family; plugins call this when they are imported.

    Raises:
        PtqError: If there is one with the same NeMo class.
    """
    for known in families():
        if known.nemo_class == family.nemo_class:
            raise PtqError(
                f"the model family {family.name} has nemo_class {family.nemo_class}, which is that of {known.name}: "
                "give it another"
            )
    _registered[family.nemo_class] = family


@cache
def _own_families() -> dict[str, Family]:
    modules = [import_module(f"nemo_ptq.models.{name}") for name in _OWN]
    return {family.nemo_class: family for module in modules for family in module.FAMILIES}


def families() -> Sequence[Family]:
    """Returns all families, this package's first."""
    return tuple({**_own_families(), **_registered}.values())


# The family that a class of the user's own is taken for, by the decoder type that the user gives.
_DECODER_FAMILIES = {
    "llama": Family("like Llama", "", "llama", "silu"),
    "gemma": Family("like Gemma", "", "gemma", "openai-gelu"),
    "gemma2": Family("like Gemma 2", "", "gemma2", "openai-gelu"),
    "gemma3": Family("like Gemma 3", "", "gemma3", "openai-gelu"),
    "gpt": Family("like GPT", "", "gpt"),
    "qwen2": Family("like Qwen 2", "", "qwen2", "silu"),
    "qwen3": Family("like Qwen 3", "", "qwen3", "silu"),
    "qwen3_moe": Family("like Qwen 3 MoE", "", "qwen3_moe", "swiglu"),
}


def unknown_to_reader(decoder: str, model: ModelSpec) -> str | None:
    """Says what TensorRT-LLM's reader of a decoder would compute differently from the model; None if nothing.

    Args:
        decoder: TensorRT-LLM's decoder type.
        model: The model.
    """
    if model.activation not in ACTIVATIONS.values():
        supported = ", ".join(sorted(set(ACTIVATIONS.values())))
        return f"activation function {model.activation} is not supported; supported: {supported}"
    if decoder in _GATED_DECODERS and (model.gated_mlp, model.activation) != (True, _GATED_DECODERS[decoder]):
        return (
            f"gated_linear_unit={model.gated_mlp} with activation function {model.activation}: the reader of decoder "
            f"{decoder} has a gated MLP with {_GATED_DECODERS[decoder]}; such models cannot be exported as trtllm"
        )
    if decoder == "gpt" and model.gated_mlp and model.activation == "squared-relu":
        return (
            "gated_linear_unit=True with activation function squared-relu: the reader of decoder gpt has no gate for "
            "it; such models cannot be exported as trtllm"
        )
    if model.num_experts and model.linear_bias:
        return (
            f"add_bias_linear=True with {model.num_experts} experts: the biases of experts cannot be exported as trtllm"
        )
    if model.qk_norm and decoder not in _QK_NORM_DECODERS:
        return (
            f"qk_layernorm=True: TensorRT-LLM's readers of decoder {decoder} ignore the norms of queries and keys, so "
            "the exported model would be another one; such models cannot be exported as trtllm"
        )
    if decoder in _QK_NORM_DECODERS and not model.qk_norm:
        return (
            f"qk_layernorm=False: the reader of decoder {decoder} normalises queries and keys; set "
            "export_config.decoder_type to one that fits the model"
        )
    if decoder != "gpt" and model.position_embedding_type == "rope" and model.rotary_percent != 1.0:
        return (
            f"rotary_percent={model.rotary_percent}: the reader of decoder {decoder} rotates whole heads; such models "
            "cannot be exported as trtllm"
        )
    if model.qk_norm and model.num_attention_heads == model.num_query_groups:
        return (
            f"qk_layernorm=True with {model.num_query_groups} query groups for as many heads: TensorRT-LLM's readers "
            "take the rows of queries and keys for others; such models cannot be exported as trtllm"
        )
    expected = None if model.gemma is None else "gemma2" if model.gemma.local_base is None else "gemma3"
    if decoder != expected and (expected or decoder in ("gemma2", "gemma3")):
        return (
            f"the reader of decoder {decoder} computes other norms, caps or windows than the model has; set "
            f"export_config.decoder_type to one that fits it{'' if expected is None else f', which is {expected}'}"
        )
    if decoder == "gemma3" and model.rotary_linear_factor is not None:
        return (
            f"rope_scaling_factor={model.rotary_linear_factor}: the reader of decoder gemma3 does not keep it from the "
            "layers with a window; such models cannot be exported as trtllm"
        )
    biases = f"add_qkv_bias={model.qkv_bias} with add_bias_linear={model.linear_bias}"
    if decoder == "llama" and model.qkv_bias != model.linear_bias:
        return (
            f"{biases}: the reader of decoder llama wants a bias on the query-key-value projection and the output "
            "projection, or on neither; such models cannot be exported as trtllm"
        )
    if decoder.startswith("qwen") and model.linear_bias:
        return (
            f"{biases}: the reader of decoder {decoder} has a bias on the query-key-value projection at most; such "
            "models cannot be exported as trtllm"
        )
    return None


def unknown_to_class(hf_class: HuggingFaceClass, model: ModelSpec) -> str | None:
    """Says what a Hugging Face class would compute differently from the model; None if nothing.

    Args:
        hf_class: The class of the model's family.
        model: The model.
    """
    fixed, modules = hf_class.nemo_fixed, hf_class.module_names()
    expected = {
        "qk_norm": "decoder.layers.{layer}.self_attention.q_layernorm" in modules,
        "post_norms": "decoder.layers.{layer}.post_mlp_layernorm" in modules,
        "gated_mlp": fixed["gated_linear_unit"],
        "activation": ACTIVATIONS[fixed["activation_func"]],
        "normalization": fixed["normalization"],
        "qkv_bias": fixed["add_bias_linear"] or fixed.get("add_qkv_bias", False),
        "linear_bias": fixed["add_bias_linear"],
    }
    found = {name: getattr(model, name, None) for name in expected} | {"post_norms": model.gemma is not None}
    wrong = [f"{name} {found[name]}" for name, value in expected.items() if found[name] != value]
    rotates = model.position_embedding_type == "rope"
    if rotates and model.rotary_percent != 1.0 and "rotary_percent" not in hf_class.fields:
        wrong.append(f"rotary_percent {model.rotary_percent}")
    if not hf_class.orders_qkv and model.num_query_groups not in (1, model.num_attention_heads):
        wrong.append(f"{model.num_query_groups} query groups")
    if not wrong:
        return None
    return (
        f"Hugging Face's {hf_class.architecture} cannot have {', '.join(wrong)}, as this model has: "
        "use export_config.export_format=trtllm"
    )


def supported_families() -> str:
    """Names the families that can be exported, for messages."""
    return ", ".join(dict.fromkeys(family.name for family in families() if family.decoder))


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
    found = [family for family in families() if config_class.startswith(family.nemo_class)]
    if found:
        family = max(found, key=lambda family: len(family.nemo_class))
        if decoder not in (None, family.decoder):
            return _DECODER_FAMILIES[decoder]
        if family.refused is not None:
            raise PtqError(
                f"{family.name} ({config_class}) is not supported for quantization; supported: {supported_families()}; "
                f"{family.refused}"
            )
        return family
    if decoder is not None:
        return _DECODER_FAMILIES[decoder]
    nearest = difflib.get_close_matches(config_class, [family.nemo_class for family in families()], n=1, cutoff=0.3)
    hint = f" (nearest: {nearest[0]}...)" if nearest else ""
    raise PtqError(
        f"model config class {config_class} is not known{hint}; supported: {supported_families()}; "
        "for a class of your own that is like one of them, set export_config.decoder_type to one of "
        f"{', '.join(_DECODER_FAMILIES)}"
    )


def hugging_face_classes() -> dict[str, HuggingFaceClass]:
    """Returns the classes of Hugging Face's that can be read, by name; where families share one, once."""
    return {
        family.hugging_face.architecture: family.hugging_face
        for family in families()
        if family.hugging_face is not None
    }


def class_of_architecture(name: str) -> HuggingFaceClass:
    """Finds the class that a config.json names.

    Args:
        name: Such as "LlamaForCausalLM".

    Raises:
        PtqError: If no family has it, or the family cannot be quantized.
    """
    classes = hugging_face_classes()
    if name in classes:
        return classes[name]
    known = ", ".join(classes)
    refused: dict[str, str | None] = dict(WITHOUT_NEMO)
    refused |= {own: family.refused for family in families() for own in family.refused_architectures}
    if name in refused:
        raise PtqError(f"{name} is not supported for quantization: {refused[name]}; supported: {known}")
    nearest = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)[0]
    raise PtqError(
        f"unknown architecture {name} in config.json; nearest: {nearest}; known: {known}; others can be added by a "
        "plugin (NEMO_PTQ_PLUGINS)"
    )
