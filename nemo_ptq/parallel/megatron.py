# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of Megatron-Core that jobs use, imported without what it would bring along for training.

As it is imported, Megatron has torch compile its fused functions, which loads TorchDynamo and TorchInductor (several
seconds), and looks for wandb. Nothing here calls the one or the other. Who needs Megatron in a job takes it from here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nemo_ptq.parallel.attributes import replaced


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stands for ``torch.compile``, as a function or as a decorator."""
    return _uncompiled if function is None else function


@contextmanager
def _without_wandb() -> Iterator[None]:
    """Lets ``import wandb`` fail, unless it has been imported already."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


with replaced(torch, "compile", _uncompiled), _without_wandb():
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import L2Norm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )

__all__ = [
    "MLP",
    "AttnBackend",
    "AttnMaskType",
    "CheckpointingConfig",
    "ColumnParallelLinear",
    "GPTModel",
    "IdentityOp",
    "L2Norm",
    "LanguageModule",
    "MLPSubmodules",
    "MegatronModule",
    "MoELayer",
    "MoESubmodules",
    "ModuleSpec",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "SequentialMLP",
    "ShardedObject",
    "SharedExpertMLP",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "get_bias_dropout_add",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "moe_utils",
    "parallel_state",
    "save_config",
    "tensor_parallel",
]
