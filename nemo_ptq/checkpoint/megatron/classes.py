# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which class of Hugging Face's, or of NeMo's, computes what a Megatron checkpoint's fields describe.

Megatron has one GPT with options, Hugging Face and NeMo have classes. A class is chosen by its distinguishing fields;
then its own description of the model is compared with all fields, one by one, and a difference is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nemo_ptq.checkpoint.huggingface.description import nemo_arguments
from nemo_ptq.checkpoint.megatron.fields import Fields
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import NEMO, HuggingFaceClass
from nemo_ptq.models.registry import class_of_architecture
from nemo_ptq.models.spec import ModelSpec, check_numbers, spec_of

# By norm, activation, whether the MLP has a gate, and whether linear layers have biases.
_LLAMA_LIKE = ("RMSNorm", "silu", True, False)
_NEMOTRON_LIKE = ("LayerNorm", "squared_relu", False, False)
_STARCODER_LIKE = ("LayerNorm", "gelu", False, True)
# Classes whose norms are stored minus one.
_ZERO_CENTERED = ("NemotronForCausalLM", "GemmaForCausalLM")
# Defaults of a class for fields that it does not set.
_OTHERWISE: Mapping[str, Any] = {
    "add_qkv_bias": False,
    "num_moe_experts": None,
    "qk_layernorm": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "scale_factor": None,
    "seq_len_interpolation_factor": None,
    "window_size": None,
}
_ROPE_ONLY = ("rotary_base", "rotary_percent", "scale_factor", "seq_len_interpolation_factor")
# Fields that are about the weights of a new model, or are compared by others.
_NOT_COMPARED = ("init_method_std", "scales_embedding", "vocab_size")


@dataclass(frozen=True)
class ChosenClass:
    """A Megatron model's counterpart in NeMo, and in Hugging Face's library.

    Attributes:
        nemo_model: NeMo's model class, with its module.
        nemo_config: NeMo's configuration class, with its module.
        arguments: Arguments of the configuration class, except the size of the vocabulary.
        spec: The model.
    """

    nemo_model: str
    nemo_config: str
    arguments: Mapping[str, Any]
    spec: ModelSpec


def choose_class(fields: Fields, rows: int) -> ChosenClass:
    """Finds the class of a model.

    Args:
        fields: Its fields.
        rows: Rows of its embedding, without padding.

    Raises:
        PtqError: If no class computes the same.
    """
    positions = fields["position_embedding_type"]
    if positions not in ("rope", "learned_absolute"):
        raise PtqError(f"the checkpoint has position_embedding_type {positions!r}: expected rope or learned_absolute")
    architecture = _architecture(fields)
    chosen = _gpt(fields, rows) if architecture is None else _of_hugging_face(architecture, fields, rows)
    check_numbers(chosen.spec)
    return chosen


def _architecture(fields: Fields) -> str | None:
    """Hugging Face's class, None where NeMo's GPT alone may be like the model."""
    style = tuple(fields[name] for name in ("normalization", "activation_func", "gated_linear_unit", "add_bias_linear"))
    has_rope = fields["position_embedding_type"] == "rope"
    if fields["scales_embedding"]:
        return "GemmaForCausalLM"
    if style == _LLAMA_LIKE:
        if fields["num_moe_experts"]:
            return "Qwen3MoeForCausalLM" if fields["qk_layernorm"] else "MixtralForCausalLM"
        distinct = {
            "Qwen3ForCausalLM": fields["qk_layernorm"],
            "Qwen2ForCausalLM": fields["add_qkv_bias"],
            "Phi3ForCausalLM": fields["rotary_percent"] != 1.0,
            "MistralForCausalLM": fields["window_size"] is not None,
        }
        return next((name for name, is_it in distinct.items() if is_it), "LlamaForCausalLM")
    if style == _NEMOTRON_LIKE:
        return "NemotronForCausalLM"
    if style == _STARCODER_LIKE and not fields["layernorm_zero_centered_gamma"]:
        if has_rope and fields["rotary_percent"] == 1.0:
            return "Starcoder2ForCausalLM"
        if not has_rope and fields["num_query_groups"] == 1:
            return "GPTBigCodeForCausalLM"
    return None


def _of_hugging_face(architecture: str, fields: Fields, rows: int) -> ChosenClass:
    hf_class = class_of_architecture(architecture)
    settings = hf_class.read(_config_json(hf_class, fields, rows))
    name, common, special = nemo_arguments(hf_class, settings)
    described = {
        **_OTHERWISE,
        "layernorm_zero_centered_gamma": architecture in _ZERO_CENTERED,
        **hf_class.nemo_fixed,
        **common,
        **special,
    }
    given = dict(fields)
    if fields["position_embedding_type"] != "rope":
        given = {field: value for field, value in given.items() if field not in _ROPE_ONLY}
    if fields["num_moe_experts"]:
        given.pop("ffn_hidden_size")
        described.setdefault("moe_ffn_hidden_size", described["ffn_hidden_size"])
    if fields["add_bias_linear"]:
        given.pop("add_qkv_bias")
    if not hf_class.can_tie:
        given.pop("share_embeddings_and_output_weights")  # a tied one is read twice
    if differs := _differences(given, described):
        raise PtqError(
            f"the checkpoint has {differs}: neither that class nor another that is known computes the same, so the "
            "model cannot be read"
        )
    arguments = {**common, **special}
    for field in ("layernorm_zero_centered_gamma", "window_size"):  # of NeMo's class, and looked at by exports
        arguments.setdefault(field, described[field])
    known = {"model_class": hf_class.nemo_model, "config_class": f"{hf_class.nemo_module}.{name}"}
    spec = spec_of({**hf_class.nemo_fixed, **arguments}, rows, **known)
    return ChosenClass(hf_class.nemo_model, known["config_class"], arguments, spec)


def _config_json(hf_class: HuggingFaceClass, fields: Fields, rows: int) -> dict[str, Any]:
    """The settings of config.json, of a model that is of a class."""
    absent = {"window_size": None, "max_position_embeddings": fields["seq_length"]}
    nemo = SimpleNamespace(**{**absent, **fields})
    heads = {"num_key_value_heads": "num_query_groups", "head_dim": "kv_channels"}
    if fields["num_moe_experts"] and "moe_intermediate_size" not in hf_class.defaults:
        nemo.ffn_hidden_size = fields["moe_ffn_hidden_size"]
    return {
        **{name: allowed[0] for name, allowed in hf_class.fixed.items()},
        **{theirs: getattr(nemo, ours) for ours, theirs in hf_class.fields.items()},
        **{theirs: fields[ours] for theirs, ours in heads.items()},
        "tie_word_embeddings": fields["share_embeddings_and_output_weights"],
        "vocab_size": rows,
        **hf_class.nemo_settings(nemo),
    }


def _differences(given: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """Says where a class describes another model than the fields do; empty where it does not."""
    wrong = [
        f"{name} {given[name]!r} (of the nearest class it would be {described[name]!r})"
        for name in sorted(given)
        if name not in _NOT_COMPARED and name in described and _plain(given[name]) != _plain(described[name])
    ]
    return ", ".join(wrong)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _gpt(fields: Fields, rows: int) -> ChosenClass:
    """NeMo's GPT, whose options are Megatron's."""
    if fields["num_moe_experts"] or fields["window_size"] is not None or fields.get("scale_factor") is not None:
        style = ", ".join(
            f"{name} {fields[name]!r}"
            for name in ("normalization", "activation_func", "gated_linear_unit", "add_bias_linear")
        )
        raise PtqError(
            f"the checkpoint has {style}, with experts, a window or a scaled rotary embedding: no class that is known "
            "computes the same, so the model cannot be read"
        )
    arguments = {name: value for name, value in fields.items() if name not in ("scales_embedding", "vocab_size")}
    known = {"model_class": f"{NEMO}base.GPTModel", "config_class": f"{NEMO}base.GPTConfig"}
    return ChosenClass(known["model_class"], known["config_class"], arguments, spec_of(arguments, rows, **known))
