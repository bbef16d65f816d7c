# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What NeMo makes of a config.json, field by field, without torch, transformers or NeMo.

The same answers as :mod:`~nemo_ptq.checkpoint.huggingface.importer` gives, in a few milliseconds; the tests compare.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.hf_files import read_json, weight_files
from nemo_ptq.errors import PtqError


@dataclass(frozen=True)
class _Family:
    """What all models of an architecture have in common.

    Attributes:
        module: Module of ``nemo.collections.llm.gpt.model`` with NeMo's classes.
        model: NeMo's model class.
        config: NeMo's config class.
        defaults: Settings of config.json that this architecture's class in transformers fills in.
        normalization: "RMSNorm" or "LayerNorm".
        gated: Whether the MLP has a gate.
        bias: Whether linear layers have a bias.
        position_embedding: "rope" or "learned_absolute".
        can_tie: Whether NeMo keeps a tied output layer tied.
        vocab_multiple: What NeMo pads the vocabulary to.
        names: Settings that this architecture has another name for.
    """

    module: str
    model: str
    config: str
    defaults: Mapping[str, Any]
    normalization: str = "RMSNorm"
    gated: bool = True
    bias: bool = False
    position_embedding: str = "rope"
    can_tie: bool = False
    vocab_multiple: int = 1
    names: Mapping[str, str] = field(default_factory=dict)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _sizes(*values: int, positions: int, **others: Any) -> dict[str, Any]:
    return {**dict(zip(_SIZES, values, strict=True)), "max_position_embeddings": positions, **others}


_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(
        "llama", "LlamaModel", "LlamaConfig", _sizes(32000, 4096, 11008, 32, 32, positions=2048), can_tie=True
    ),
    "MistralForCausalLM": _Family(
        "mistral",
        "MistralModel",
        "MistralConfig7B",
        _sizes(32000, 4096, 14336, 32, 32, positions=131072, num_key_value_heads=8, sliding_window=4096),
    ),
    "MixtralForCausalLM": _Family(
        "mixtral",
        "MixtralModel",
        "MixtralConfig8x7B",
        _sizes(32000, 4096, 14336, 32, 32, positions=131072, num_key_value_heads=8, num_local_experts=8)
        | {"num_experts_per_tok": 2},
        vocab_multiple=128,
    ),
    "GemmaForCausalLM": _Family(
        "gemma",
        "GemmaModel",
        "GemmaConfig",
        _sizes(256000, 3072, 24576, 28, 16, positions=8192, num_key_value_heads=16, head_dim=256)
        | {"tie_word_embeddings": True},
        can_tie=True,
    ),
    "GPTBigCodeForCausalLM": _Family(
        "starcoder",
        "StarcoderModel",
        "StarcoderConfig",
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "multi_query": True},
        normalization="LayerNorm",
        gated=False,
        bias=True,
        position_embedding="learned_absolute",
        names={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
    "Starcoder2ForCausalLM": _Family(
        "starcoder2",
        "Starcoder2Model",
        "Starcoder2Config",
        _sizes(49152, 3072, 12288, 30, 24, positions=4096, num_key_value_heads=2),
        normalization="LayerNorm",
        gated=False,
        bias=True,
    ),
    "NemotronForCausalLM": _Family(
        "nemotron",
        "NemotronModel",
        "NemotronConfig",
        _sizes(256000, 6144, 24576, 32, 48, positions=4096),
        normalization="LayerNorm",
        gated=False,
    ),
}


def describe(directory: Path) -> dict[str, Any]:
    """Returns the fields of :class:`~nemo_ptq.checkpoint.metadata.CheckpointMetadata` for a Hugging Face directory.

    Args:
        directory: Its config.json names the architecture, and its weights are there.

    Raises:
        PtqError: If files are missing, the architecture is not known, or the model is quantized already.
    """
    content = read_json(directory / "config.json")
    weight_files(directory)
    if "quantization_config" in content:
        raise PtqError(f"{directory} is quantized already: give the model as it was before")
    architecture = str((content.get("architectures") or ["(none given)"])[0])
    if architecture not in _FAMILIES:
        raise PtqError(f"{directory} is of architecture {architecture}, not one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[architecture]
    hf = {**family.defaults, **content}
    hf |= {common: hf[own] for common, own in family.names.items() if own in hf}
    try:
        return _fields(family, hf)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise PtqError(f"{directory / 'config.json'} has a setting that is no size: {error}") from error


def _fields(family: _Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    if "multi_query" in hf:
        groups = 1 if hf["multi_query"] else heads
    has_experts = "num_local_experts" in family.defaults
    module = f"nemo.collections.llm.gpt.model.{family.module}."
    return {
        "model_class": module + family.model,
        "config_class": module + _config_class(family, hf),
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_size": hf.get("head_dim") or hidden // heads,
        "ffn_hidden_size": hf.get("intermediate_size") or 4 * hidden,
        "gated_mlp": family.gated,
        "vocab_size": -(-hf["vocab_size"] // family.vocab_multiple) * family.vocab_multiple,
        "num_experts": hf["num_local_experts"] if has_experts else None,
        "experts_per_token": hf["num_experts_per_tok"] if has_experts else 0,
        "seq_length": hf.get("sliding_window") if _seq_length_is_window(family, hf) else hf["max_position_embeddings"],
        "position_embedding_type": family.position_embedding,
        "normalization": family.normalization,
        "tied_embeddings": family.can_tie and bool(hf.get("tie_word_embeddings", False)),
        "linear_bias": family.bias,
        "qkv_bias": family.bias,
        "qk_norm": False,
    }


def _config_class(family: _Family, hf: Mapping[str, Any]) -> str:
    """NeMo has classes of their own for Llama 3.1's rotary embedding, and for the larger Mixtral."""
    scaling = hf.get("rope_scaling") or {}
    if family.module == "llama" and scaling.get("rope_type", scaling.get("type")) == "llama3":
        return "Llama31Config"
    if family.module == "mixtral" and hf["hidden_size"] == 6144:
        return "MixtralConfig8x22B"
    return family.config


def _seq_length_is_window(family: _Family, hf: Mapping[str, Any]) -> bool:
    """NeMo takes Mistral's window for the length of its sequences."""
    return family.module == "mistral" and hf.get("sliding_window") is not None
