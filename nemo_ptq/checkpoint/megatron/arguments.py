# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Megatron-LM's arguments of a model, and the models that it has none for. Imports nothing heavy, for plans."""

from argparse import Namespace
from typing import Any

from nemo_ptq.models.spec import ModelSpec, RotaryScaling

# Megatron's fixed scaling of a rotary embedding, except the factor.
_ROPE_SCALING = (1.0, 4.0, 8192)


def unknown_to_megatron(model: ModelSpec) -> str | None:
    """Names the part of a model that Megatron-LM has no arguments for; None where it has all of them."""
    has_gemma_name = "gemma" in model.config_class.lower()
    lacking = {
        "layers with state spaces": model.state_space is not None,
        "the scaled embedding of Gemma": has_gemma_name or model.gemma is not None,
        "a gate with gelu": model.gated_mlp and model.activation != "silu",
        f"activation {model.activation}": model.activation not in ("silu", "gelu", "squared-relu"),
        "silu without a gate": model.activation == "silu" and not model.gated_mlp,
        "longrope": model.long_rope is not None,
        f"the rotary scaling {model.rotary_scaling}": not _has_megatrons_scaling(model.rotary_scaling),
    }
    wrong = [what for what, is_so in lacking.items() if is_so]
    return f"Megatron-LM has no arguments for {', '.join(wrong)}" if wrong else None


def _has_megatrons_scaling(scaling: RotaryScaling | None) -> bool:
    if scaling is None:
        return True
    numbers = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
    return numbers == _ROPE_SCALING


def megatron_arguments(model: ModelSpec, config: Any) -> Namespace:
    """Returns Megatron-LM's arguments of a model, except its data type.

    Args:
        model: The model, one that Megatron-LM knows.
        config: NeMo's configuration of it, as attributes.
    """
    window = getattr(config, "window_size", None)
    scaling = model.rotary_scaling
    arguments = {
        "add_bias_linear": model.linear_bias,
        "add_position_embedding": True,
        "add_qkv_bias": model.qkv_bias and not model.linear_bias,
        "apply_layernorm_1p": bool(getattr(config, "layernorm_zero_centered_gamma", False)),
        "attention_dropout": 0.0,
        "ckpt_format": "torch_dist",
        "disable_bias_linear": not model.linear_bias,
        "ffn_hidden_size": model.ffn_hidden_size if model.num_experts is None else config.ffn_hidden_size,
        "group_query_attention": model.num_query_groups != model.num_attention_heads,
        "hidden_dropout": 0.0,
        "hidden_size": model.hidden_size,
        "kv_channels": model.head_size,
        "make_vocab_size_divisible_by": 1,
        "max_position_embeddings": model.seq_length,
        "norm_epsilon": model.norm_epsilon,
        "normalization": model.normalization,
        "num_attention_heads": model.num_attention_heads,
        "num_experts": model.num_experts,
        "num_layers": model.num_layers,
        "num_query_groups": model.num_query_groups,
        "padded_vocab_size": model.vocab_size,
        "pipeline_model_parallel_size": 1,
        "position_embedding_type": model.position_embedding_type,
        "qk_layernorm": model.qk_norm,
        "rope_scaling_factor": 8.0 if scaling is None else scaling.factor,
        "rotary_base": model.rotary_base,
        "rotary_interleaved": False,
        "rotary_percent": model.rotary_percent,
        "rotary_seq_len_interpolation_factor": model.rotary_linear_factor,
        "seq_length": model.seq_length,
        "squared_relu": model.activation == "squared-relu",
        "swiglu": model.activation == "silu",
        "tensor_model_parallel_size": 1,
        "tokenizer_type": "HuggingFaceTokenizer",
        "untie_embeddings_and_output_weights": not model.tied_embeddings,
        "use_rope_scaling": scaling is not None,
        "use_rotary_position_embeddings": model.position_embedding_type == "rope",
        # NeMo's classes count the token itself, Megatron those before it.
        "window_size": None if window is None or window[0] < 0 else (window[0] - 1, 0),
    }
    if model.num_experts is not None:
        arguments |= {
            "moe_ffn_hidden_size": model.ffn_hidden_size,
            "moe_grouped_gemm": False,
            "moe_layer_freq": 1,
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "softmax",
            "moe_router_topk": model.experts_per_token,
        }
    return Namespace(**arguments)
