# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How a TensorRT-LLM checkpoint says which of its layers are not quantized. Needs no torch: the plan asks it."""

from collections.abc import Collection

from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import TRTLLM
from nemo_ptq.models.spec import ModelSpec

# What readers leave unquantized by default; naming anything replaces their default, so it is spelled out.
_ALWAYS_EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding")
# What the quantized layers are called, for each linear layer of Megatron's.
_ATTENTION_LAYERS = {name: tuple(TRTLLM[name]) for name in ("self_attention.linear_qkv", "self_attention.linear_proj")}
_DENSE_LAYERS = _ATTENTION_LAYERS | {name: tuple(TRTLLM[name]) for name in ("mlp.linear_fc1", "mlp.linear_fc2")}
# Readers know a mixture of experts by one name.
_EXPERT_LAYERS = _ATTENTION_LAYERS | {"mlp.experts.local_experts.0.linear_fc1": ("mlp",)}


def exclude_modules(shape: ModelSpec, unquantized: Collection[str], pipeline_parallel: int) -> list[str]:
    """Returns patterns for the layers that are not quantized although the checkpoint is.

    Args:
        shape: The model.
        unquantized: Megatron's names of its linear layers that are not.
        pipeline_parallel: Pipeline parallelism of the files.

    Raises:
        PtqError: If config.json cannot say it.
    """
    patterns = list(_ALWAYS_EXCLUDED)
    layers = shape.num_layers
    for kind, names in (_EXPERT_LAYERS if shape.num_experts else _DENSE_LAYERS).items():
        plain = [i for i in range(layers) if f"decoder.layers.{i}.{kind}" in unquantized]
        if len(plain) == layers:
            patterns += [f"*{name}" for name in names]
        elif plain and pipeline_parallel > 1:
            raise PtqError(
                f"{kind} is unquantized in some layers only ({plain}), which config.json cannot say for inference_pp="
                f"{pipeline_parallel}: it counts layers from zero in every stage; use inference_pp=1"
            )
        else:
            patterns += [f"transformer.layers.{i}.{name}" for i in plain for name in names]
    return patterns
