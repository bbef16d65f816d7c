# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that Megatron-LM takes: torch_dist files, and the arguments of the model beside them.

It is a release, as Megatron-LM calls a checkpoint without an iteration: ``--load`` finds the model, and no optimizer.
``--use-checkpoint-args`` takes the sizes from it.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.checkpoint.megatron.directories import TOKENIZER
from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.checkpoint.writer import COMMON_STATE, write_tensors
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec, RotaryScaling

_RELEASE = "release"
# What Megatron scales a rotary embedding by, but for the factor.
_ROPE_SCALING = (1.0, 4.0, 8192)


def write_megatron(
    directory: Path, model: ModelSpec, config: Any, parts: Sequence[TensorPart], tokenizer: Any | None
) -> None:
    """Writes a checkpoint.

    Args:
        directory: An empty directory, the root of the checkpoint.
        model: The model.
        config: NeMo's configuration of it, as attributes.
        parts: Every part of every tensor.
        tokenizer: Hugging Face's, kept beside the files; None for none.

    Raises:
        PtqError: If Megatron-LM has no arguments for such a model.
    """
    arguments = megatron_arguments(model, config)
    release = directory / _RELEASE
    # Megatron's arguments belong to the common state; nothing of a training job is there.
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0}
    write_tensors(release, parts, "", {**common, "content_metadata": COMMON_STATE["content_metadata"]})
    if tokenizer is not None:
        tokenizer.save_pretrained(release / TOKENIZER)
    (directory / "latest_checkpointed_iteration.txt").write_text(_RELEASE, encoding="utf-8")


def megatron_arguments(model: ModelSpec, config: Any) -> Namespace:
    """Returns Megatron-LM's arguments of a model.

    Args:
        model: The model.
        config: NeMo's configuration of it, as attributes.

    Raises:
        PtqError: If it has none.
    """
    window = getattr(config, "window_size", None)
    has_gemma_name = "gemma" in model.config_class.lower()
    lacking = {
        "the scaled embedding of Gemma": has_gemma_name or model.gemma is not None,
        "a gate with gelu": model.gated_mlp and model.activation != "silu",
        f"activation {model.activation}": model.activation not in ("silu", "gelu", "squared-relu"),
        "silu without a gate": model.activation == "silu" and not model.gated_mlp,
        "longrope": model.long_rope is not None,
        f"the rotary scaling {model.rotary_scaling}": not _has_megatrons_scaling(model.rotary_scaling),
    }
    if wrong := [what for what, is_so in lacking.items() if is_so]:
        raise PtqError(f"Megatron-LM has no arguments for {', '.join(wrong)}: choose another format")
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
    return Namespace(**arguments, params_dtype=getattr(config, "params_dtype", torch.bfloat16))


def _has_megatrons_scaling(scaling: RotaryScaling | None) -> bool:
    if scaling is None:
        return True
    numbers = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
    return numbers == _ROPE_SCALING
