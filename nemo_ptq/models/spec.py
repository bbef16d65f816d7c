# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The sizes and options of a model that decide how its tensors are laid out."""

from dataclasses import dataclass
from typing import Any

from nemo_ptq.errors import PtqError

# Our name of each activation, by that of NeMo's function.
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "openai_gelu": "gelu", "squared_relu": "squared-relu"}


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's frequency-dependent stretching of the rotary embedding, as NeMo configures it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """A GPT-like model as a whole, whatever its parallelism.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads (query groups).
        head_size: Width of one head; not always hidden_size / num_heads.
        ffn_size: Inner width of one MLP, or of one expert.
        vocab_size: Rows of the embedding in the checkpoint.
        max_positions: Longest sequence.
        norm: "LayerNorm" or "RMSNorm".
        norm_epsilon: Added to the variance.
        activation: "gelu", "silu" or "squared-relu".
        gated: Whether the activation's output is multiplied with a second projection.
        linear_bias: Whether every linear layer has a bias.
        qkv_bias: Whether the query-key-value projection has one.
        qk_norm: Whether queries and keys are normalised.
        tied_embeddings: Whether the output projection is the embedding.
        position_embedding: "rope" or "learned_absolute".
        rotary_percent: Share of a head that is rotated.
        rotary_base: Base of the rotary frequencies.
        rotary_linear_factor: Factor by which positions are interpolated, or None.
        rotary_scaling: Llama 3.1's scaling, or None.
        num_experts: Experts of each MLP, 0 where it is dense.
        experts_per_token: Experts that each token goes through.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm: str
    norm_epsilon: float
    activation: str
    gated: bool
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    position_embedding: str
    rotary_percent: float
    rotary_base: float
    rotary_linear_factor: float | None
    rotary_scaling: RotaryScaling | None
    num_experts: int
    experts_per_token: int


def _activation_name(function: Any) -> str:
    name = getattr(function, "__name__", str(function))
    if name not in ACTIVATIONS:
        raise PtqError(f"activation function {name} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def shape_of(config: Any, vocab_size: int) -> ModelShape:
    """Reads a model's shape from the NeMo config that built it.

    Args:
        config: A built NeMo ``GPTConfig``.
        vocab_size: Rows of the embedding in the checkpoint.

    Raises:
        PtqError: If the model's activation function has no name in the export formats.
    """
    scaling = None
    if getattr(config, "scale_factor", None) is not None and hasattr(config, "old_context_len"):
        scaling = RotaryScaling(
            config.scale_factor, config.low_freq_factor, config.high_freq_factor, config.old_context_len
        )
    interpolation = config.seq_len_interpolation_factor
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups or config.num_attention_heads,
        head_size=config.kv_channels,
        ffn_size=config.ffn_hidden_size,
        vocab_size=vocab_size,
        max_positions=config.seq_length,
        norm=config.normalization,
        norm_epsilon=config.layernorm_epsilon,
        activation=_activation_name(config.activation_func),
        gated=config.gated_linear_unit,
        linear_bias=config.add_bias_linear,
        qkv_bias=config.add_bias_linear or config.add_qkv_bias,
        qk_norm=config.qk_layernorm,
        tied_embeddings=config.share_embeddings_and_output_weights,
        position_embedding=config.position_embedding_type,
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        rotary_linear_factor=None if interpolation in (None, 1, 1.0) else float(interpolation),
        rotary_scaling=scaling,
        num_experts=config.num_moe_experts or 0,
        experts_per_token=config.moe_router_topk if config.num_moe_experts else 0,
    )
