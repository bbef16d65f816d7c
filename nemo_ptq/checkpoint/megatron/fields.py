# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Reads a model from Megatron-LM's arguments or Megatron-Bridge's configuration, as fields of NeMo's configuration.

Both are read as data: nothing that they name is imported or called.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.index import read_stored
from nemo_ptq.checkpoint.inert import Record, read_saved
from nemo_ptq.checkpoint.megatron.directories import COMMON, COMMON_OBJECT, RUN_CONFIG
from nemo_ptq.checkpoint.megatron.options import check_options
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_yaml

Fields = Mapping[str, Any]
"""Fields of NeMo's configuration: sizes, and everything that decides the model's computation."""

# Megatron-LM has had two names for some arguments. Those on the right are of NeMo, and of its later versions.
_RENAMED = {
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "use_rope_scaling": "rope_scaling",
}
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "layernorm_epsilon", "normalization", "seq_length")
_READ = frozenset(
    (
        *_NEEDED,
        *("activation_func", "add_bias_linear", "add_qkv_bias", "ffn_hidden_size", "gated_linear_unit"),
        *("group_query_attention", "init_method_std", "kv_channels", "layernorm_zero_centered_gamma"),
        *("max_position_embeddings", "moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "num_moe_experts"),
        *("num_query_groups", "openai_gelu", "padded_vocab_size", "position_embedding_type", "qk_layernorm"),
        *("rope_scaling", "rope_scaling_factor", "rotary_base", "rotary_percent", "seq_len_interpolation_factor"),
        *("share_embeddings_and_output_weights", "should_pad_vocab", "squared_relu", "swiglu"),
        *("untie_embeddings_and_output_weights", "use_rotary_position_embeddings", "vocab_size", "window_size"),
    )
)
# Options that are sizes, where they are given.
_SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
    *("moe_ffn_hidden_size", "moe_router_topk", "seq_length"),
)
# Options that are true or false, and what Megatron takes where they are not given.
_SWITCHES = {
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "gated_linear_unit": False,
    "layernorm_zero_centered_gamma": False,
    "qk_layernorm": False,
    "rope_scaling": False,
    "share_embeddings_and_output_weights": True,
}
# Megatron's values for Llama 3.1's scaling of the rotary embedding, except the factor.
_ROPE_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "fast_gelu": "gelu",
    "openai_gelu": "gelu",
    "squared_relu": "squared_relu",
}
# Megatron-Bridge's classes that are Megatron's GPT with settings of their own, and no code.
_PROVIDERS = re.compile(
    r"(GPT|Llama[23]?|Llama3[12]|CodeLlama|Qwen2|Qwen25|Qwen3|Qwen3MoE|Nemotron[34]?|Mistral|MistralSmall3|Mixtral|"
    r"Starcoder2|Gemma|CodeGemma)ModelProvider\w*"
)
# Those that scale the rotary embedding as Llama 3.1 does, of Megatron-Bridge 0.3; later ones have Megatron's options.
_LLAMA_31 = re.compile(r"Llama3[12]ModelProvider\w*")
_LLAMA_31_SCALING = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
# Those that also scale the embedding.
_GEMMA = re.compile(r"(Code)?GemmaModelProvider\w*")
_SHOWN = 60


def read_fields(iteration: Path) -> Fields:
    """Reads the description of the model that one iteration of a checkpoint holds.

    Args:
        iteration: Directory with the torch_dist files.

    Returns:
        The fields. "vocab_size" is None where nothing says how many rows of the embedding are padding, as of
        Megatron-LM; "scales_embedding" is true of Gemma.

    Raises:
        PtqError: If there is none, it lacks a field that every model has, or the model has an unknown computation.
    """
    if (iteration / RUN_CONFIG).is_file():
        return _of_bridge(iteration / RUN_CONFIG)
    return _of_arguments(*_common_state(iteration))


def _common_state(iteration: Path) -> tuple[Path, Any]:
    """Reads the common state of a job's ranks; also returns the file that it is in."""
    file = iteration / COMMON
    if file.is_file():
        return file, read_saved(file)
    place = read_stored(iteration).objects.get(COMMON_OBJECT)
    if place is None:
        raise PtqError(f"{iteration} lacks {COMMON}: it was not saved to its end, or not copied whole; copy it again")
    file = iteration / place.file
    objects = read_saved(file, place.start, place.length)
    return file, objects[0] if isinstance(objects, list) and objects else None


def _of_arguments(file: Path, common: Any) -> Fields:
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, Record) or not vars(arguments):
        raise PtqError(
            f"{file} holds no args, and {file.with_name(RUN_CONFIG)} is missing: give a checkpoint that Megatron-LM or "
            "Megatron-Bridge has saved, with the arguments of its training"
        )
    given: dict[str, Any] = {}
    for name, value in vars(arguments).items():
        if value is not None:
            given[_RENAMED.get(name, name)] = value
    check_options(str(file), given, _READ, only_the_model=False)
    options = {**given, "scales_embedding": False, "vocab_size": None}
    options["activation_func"] = (
        "silu" if given.get("swiglu") else "squared_relu" if given.get("squared_relu") else "gelu"
    )
    options["gated_linear_unit"] = bool(given.get("swiglu") or given.get("gated_linear_unit"))
    options.setdefault("add_bias_linear", not given.get("disable_bias_linear", False))  # of older versions
    options["share_embeddings_and_output_weights"] = not given.get("untie_embeddings_and_output_weights", False)
    if not given.get("group_query_attention"):
        options["num_query_groups"] = None
    if given.get("use_rotary_position_embeddings"):
        options["position_embedding_type"] = "rope"
    if given.get("max_position_embeddings") is not None:
        options["seq_length"] = given["max_position_embeddings"]
    return _fields(file, options)


def _of_bridge(file: Path) -> Fields:
    content = read_yaml(file)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise PtqError(f"{file} has no section of the model: copy the checkpoint again")
    provider = str(model.get("_target_", "")).rpartition(".")[2]
    if not _PROVIDERS.fullmatch(provider):
        raise PtqError(
            f"{file} has a model of {str(model.get('_target_'))[:_SHOWN]!r}, and what that computes is not known: "
            "models of Megatron-Bridge's GPTModelProvider and its dense and mixture-of-experts families can be read"
        )
    scaling = _LLAMA_31_SCALING if _LLAMA_31.fullmatch(provider) else ()
    check_options(str(file), model, _READ.union(scaling), only_the_model=True)
    activation = model.get("activation_func")
    name = str(activation.get("_target_") if isinstance(activation, dict) else activation).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise PtqError(f"{file} has activation_func {name[:_SHOWN]!r}: expected one of {', '.join(_ACTIVATIONS)}")
    options = {**model, "activation_func": _ACTIVATIONS[name], "scales_embedding": bool(_GEMMA.fullmatch(provider))}
    fields = _fields(file, options)
    if missing := [name for name in scaling if model.get(name) is None]:
        raise PtqError(f"{file} has no {', '.join(missing)}, as {provider} has: copy the checkpoint again")
    return {**fields, **{name: model[name] for name in scaling}}


def _fields(file: Path, options: Mapping[str, Any]) -> Fields:
    """The fields of NeMo's configuration, from options under NeMo's names.

    Raises:
        PtqError: If an option is missing or not valid.
    """
    if missing := [name for name in _NEEDED if options.get(name) is None]:
        raise PtqError(f"{file} has no {', '.join(missing)}: give a checkpoint with the arguments of its training")
    for name in _SWITCHES:
        if not isinstance(options.get(name, True), bool):
            raise PtqError(f"{file} has {name} {str(options[name])[:_SHOWN]!r}: it must be true or false")
    for name in _SIZES:
        value = options.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise PtqError(f"{file} has {name} {str(value)[:_SHOWN]!r}: it must be a positive whole number")
    if options["normalization"] not in ("LayerNorm", "RMSNorm"):
        raise PtqError(f"{file} has normalization {options['normalization']!r}: expected LayerNorm or RMSNorm")
    frequency = options.get("moe_layer_freq", 1)
    in_all_layers = all(one == 1 for one in frequency) if isinstance(frequency, list) else frequency == 1
    if options.get("num_moe_experts") and not in_all_layers:
        raise PtqError(f"{file} has moe_layer_freq {frequency!r}: only models with experts in every layer can be read")
    try:
        return {**_plain(options), **_rotary(options), "window_size": _window(options.get("window_size"))}
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise PtqError(f"{file} does not describe a model ({error}): copy the checkpoint again") from error


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads, experts = options["hidden_size"], options["num_attention_heads"], options.get("num_moe_experts")
    found = {
        **{name: options[name] for name in _NEEDED},
        **{name: options.get(name, usual) for name, usual in _SWITCHES.items() if name != "rope_scaling"},
        "activation_func": options["activation_func"],
        "ffn_hidden_size": options.get("ffn_hidden_size") or 4 * hidden,
        "init_method_std": options.get("init_method_std") or 0.02,
        "kv_channels": options.get("kv_channels") or hidden // heads,
        "num_moe_experts": experts or None,
        "num_query_groups": options.get("num_query_groups") or heads,
        "position_embedding_type": options.get("position_embedding_type", "learned_absolute"),
        "scales_embedding": options["scales_embedding"],
        "vocab_size": options.get("vocab_size"),
    }
    if experts:
        found["moe_router_topk"] = options.get("moe_router_topk", 2)
        found["moe_ffn_hidden_size"] = options.get("moe_ffn_hidden_size") or found["ffn_hidden_size"]
    return found


def _rotary(options: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        "rotary_base": options.get("rotary_base", 10000),
        "rotary_percent": options.get("rotary_percent", 1.0),
        "seq_len_interpolation_factor": options.get("seq_len_interpolation_factor"),
    }
    if options.get("rope_scaling"):
        found |= {"scale_factor": options.get("rope_scaling_factor", 8.0), **_ROPE_SCALING}
    return found


def _window(window: Any) -> list[int] | None:
    """The window as NeMo's checkpoints have it, which count the token itself: Megatron counts those before it."""
    if window is None:
        return None
    before, after = window if isinstance(window, list | tuple) and len(window) == 2 else (None, None)
    if type(before) is not int or before < 0 or after != 0:
        raise ValueError(f"window_size is {window!r}")
    return [before + 1, 0]
