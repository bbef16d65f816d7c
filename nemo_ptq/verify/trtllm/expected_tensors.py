# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The exact set of tensors that config.json promises: their names, shapes, dtypes and how the ranks share them."""

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_ptq.verify.model_config import Config

# Weights that share one block scale, fixed by the NVFP4 format.
NVFP4_BLOCK_SIZE = 16

# config.json's dtype -> the dtype's name in a safetensors header.
SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# Algorithms that the format's table describes for a linear layer.
ALGORITHMS = ("FP8", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "NVFP4")


@dataclass(frozen=True)
class Part:
    """A run of rows (or columns) inside one rank's shard.

    Attributes:
        share: Its size in relation to the shard's other parts.
        replicas: Consecutive ranks that hold the same copy of it.
    """

    share: int = 1
    replicas: int = 1


@dataclass(frozen=True)
class Shard:
    """How one tensor is spread over the tensor-parallel ranks.

    Attributes:
        dim: The dimension that is cut.
        parts: What each rank's piece consists of; every part is cut on its own.
        size: Global size along ``dim``; what the ranks hold beyond it is padding. None where nothing is padded.
    """

    dim: int = 0
    parts: tuple[Part, ...] = (Part(),)
    size: int | None = None


@dataclass(frozen=True)
class TensorSpec:
    """One tensor in one rank's file.

    Attributes:
        dtype: Name in a safetensors header, such as "BF16" or "F8_E4M3".
        shape: Shape of the rank's shard.
        shard: How the global tensor is cut; None where every rank holds all of it.
        optional: Whether the reader accepts the file without it.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    optional: bool = False


@dataclass(frozen=True)
class Linear:
    """A linear layer of one rank.

    Attributes:
        name: Full name in the rank's file, such as "transformer.layers.0.mlp.fc".
        module: Name that the reader matches exclude_modules with: the name, or the whole MLP for experts.
        out_features: Output features of the rank's shard.
        in_features: Input features of the rank's shard.
        column_parallel: Whether the ranks share the output features; else the input features.
        bias: Whether the reader expects a bias.
        parts: Parts of the output features that are cut on their own (column-parallel only).
        experts: Number of experts stacked in front of the weight, or None.
        size: Global output features where ranks are padded, or None.
    """

    name: str
    module: str
    out_features: int
    in_features: int
    column_parallel: bool
    bias: bool = False
    parts: tuple[Part, ...] = (Part(),)
    experts: int | None = None
    size: int | None = None


def layer_linears(config: Config, layer: int) -> tuple[Linear, ...]:
    """The linear layers of one decoder layer, as one rank holds them.

    Args:
        config: Sizes must divide as the format's rules demand.
        layer: Index local to the pipeline stage, as in the file's names.
    """
    prefix = f"transformer.layers.{layer}."
    hidden, head_size = config.hidden_size, config.head_size
    inner = config.intermediate_size // config.mapping.tp_size
    heads, kv_heads = config.heads_per_rank, config.kv_heads_per_rank
    kv_part = Part(kv_heads, config.kv_replicas)

    def linear(name: str, out: int, in_: int, column: bool, bias: bool, parts: tuple[Part, ...] = (Part(),)) -> Linear:
        return Linear(prefix + name, prefix + name, out, in_, column, bias, parts)

    attention = (
        linear(
            "attention.qkv",
            (heads + 2 * kv_heads) * head_size,
            hidden,
            True,
            config.attention_bias,
            (Part(heads), kv_part, kv_part),
        ),
        linear("attention.dense", hidden, heads * head_size, False, config.attention_bias and not config.is_qwen),
    )
    if config.moe:
        experts, module = config.moe.num_experts, prefix + "mlp"
        return (
            *attention,
            Linear(f"{module}.fc", module, 2 * inner, hidden, True, parts=(Part(), Part()), experts=experts),
            Linear(f"{module}.proj", module, hidden, inner, False, experts=experts),
        )
    gate = (linear("mlp.gate", inner, hidden, True, config.mlp_bias),) if config.gated else ()
    return (
        *attention,
        linear("mlp.fc", inner, hidden, True, config.mlp_bias),
        *gate,
        linear("mlp.proj", hidden, inner, False, config.mlp_bias),
    )


def lm_head(config: Config) -> Linear:
    """The output layer of the last pipeline stage, as one rank holds it."""
    rows = -(-config.vocab_size // config.mapping.tp_size)
    return Linear("lm_head", "lm_head", rows, config.hidden_size, True, size=config.vocab_size)


def linear_tensors(config: Config, linear: Linear) -> dict[str, TensorSpec]:
    """Names and specs of everything that belongs to one linear layer, by its algorithm."""
    algorithm = config.quantization.algorithm_of(linear.module)
    dtype = SAFETENSORS_DTYPE[config.dtype]
    out, in_ = linear.out_features, linear.in_features
    experts = () if linear.experts is None else (linear.experts,)
    rows = Shard(len(experts), linear.parts, linear.size) if linear.column_parallel else None
    columns = None if linear.column_parallel else Shard(len(experts) + 1)
    matrix = rows or columns
    # A scale for each input feature is cut where the input features are: along its only dimension.
    inputs = None if linear.column_parallel else Shard()
    scalar = TensorSpec("F32", (1,))

    if algorithm is None:
        tensors = {"weight": TensorSpec(dtype, (*experts, out, in_), matrix)}
    elif algorithm == "FP8":
        tensors = {
            "weight": TensorSpec("F8_E4M3", (*experts, out, in_), matrix),
            "weights_scaling_factor": TensorSpec("F32", (*experts, 1)),
            "activation_scaling_factor": scalar,
        }
    elif algorithm == "W8A8_SQ_PER_CHANNEL":
        tensors = {
            "weight": TensorSpec("I8", (out, in_), matrix),
            "weights_scaling_factor": TensorSpec("F32", (out,), rows),
            "activation_scaling_factor": scalar,
            "prequant_scaling_factor": TensorSpec(dtype, (in_,), inputs),
        }
    elif algorithm == "NVFP4":
        tensors = {
            "weight": TensorSpec("U8", (out, in_ // 2), matrix),
            "weights_scaling_factor": TensorSpec("F8_E4M3", (out, in_ // NVFP4_BLOCK_SIZE), matrix),
            "weights_scaling_factor_2": TensorSpec("F32", ()),
            "activation_scaling_factor": TensorSpec("F32", ()),
        }
    else:  # W4A16_AWQ and W4A8_AWQ
        tensors = {
            "weight": TensorSpec("I8", (out // 2, in_), matrix),
            "weights_scaling_factor": TensorSpec("F32", (out, in_ // config.quantization.group_size), matrix),
            "prequant_scaling_factor": TensorSpec(dtype, (in_,), inputs),
        }
        if algorithm == "W4A8_AWQ":
            tensors |= {"weights_scaling_factor_2": scalar, "activation_scaling_factor": scalar}
    if linear.bias:
        tensors["bias"] = TensorSpec(dtype, (out,), rows)
    return {f"{linear.name}.{suffix}": spec for suffix, spec in tensors.items()}


def rank_tensors(config: Config, pp_rank: int) -> dict[str, TensorSpec]:
    """Everything that the files of one pipeline stage hold; the same for each of its tensor-parallel ranks.

    Args:
        config: Sizes must divide as the format's rules demand.
        pp_rank: Pipeline stage, counted from 0.

    Returns:
        Spec of each tensor by its name in the file (layers numbered from 0 in every stage).
    """
    tp_size, hidden = config.mapping.tp_size, config.hidden_size
    dtype = SAFETENSORS_DTYPE[config.dtype]
    tensors: dict[str, TensorSpec] = {}

    def embedding(rows: int) -> TensorSpec:
        return TensorSpec(dtype, (-(-rows // tp_size), hidden), Shard(size=rows))

    def norm(name: str, size: int = hidden) -> None:
        tensors[f"{name}.weight"] = TensorSpec(dtype, (size,))
        if not config.rmsnorm:
            tensors[f"{name}.bias"] = TensorSpec(dtype, (size,))

    if pp_rank == 0:
        tensors["transformer.vocab_embedding.weight"] = embedding(config.vocab_size)
        if config.position_embedding_type == "learned_absolute":
            tensors["transformer.position_embedding.weight"] = embedding(config.max_position_embeddings)
    for layer in range(config.layers_per_stage):
        prefix = f"transformer.layers.{layer}."
        norm(prefix + "input_layernorm")
        norm(prefix + "post_layernorm")
        for place in ("pre", "post") if config.post_norms else ():
            norm(f"{prefix}{place}_feedforward_layernorm")
        for heads in ("q", "k") if config.qk_norm else ():
            norm(f"{prefix}attention.{heads}_layernorm", config.head_size)
        for linear in layer_linears(config, layer):
            tensors |= linear_tensors(config, linear)
        if config.moe:
            tensors[prefix + "mlp.router.weight"] = TensorSpec("F32", (config.moe.num_experts, hidden))
        if config.quantization.kv_cache_algorithm:
            tensors[prefix + "attention.kv_cache_scaling_factor"] = TensorSpec("F32", (1,))
            for which in ("k", "v"):
                name = f"{prefix}attention.{which}_cache_scaling_factor"
                tensors[name] = TensorSpec("F32", (1,), optional=True)
    if pp_rank == config.mapping.pp_size - 1:
        norm("transformer.ln_f")
        if not config.lm_head_is_shared:
            tensors |= linear_tensors(config, lm_head(config))
    return tensors


def stages(config: Config) -> Iterator[tuple[int, range]]:
    """Yields each pipeline stage with the global indices of its layers."""
    for pp_rank in range(config.mapping.pp_size):
        first = pp_rank * config.layers_per_stage
        yield pp_rank, range(first, first + config.layers_per_stage)
