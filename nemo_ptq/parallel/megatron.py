# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The parts of Megatron-Core that jobs use, imported without what it would bring along for training.

As it is imported, Megatron has torch compile its fused functions, which loads TorchDynamo and TorchInductor (several
seconds), and looks for wandb, TensorBoard, distributed tensors and torch's builder of extensions. Nothing here uses any
of them. Who needs Megatron in a job takes it from here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.stand_ins import stand_ins


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stands for ``torch.compile``, as a function or as a decorator."""
    return _uncompiled if function is None else function


# What Megatron can do without.
_OPTIONAL = ("wandb", "torch.utils.tensorboard", "torch.distributed._tensor", "torch.distributed.tensor")
# What it imports from others and uses in training and serving alone: torch's builder of extensions, which loads
# setuptools, and optimizers, which load torch's distributed checkpoints.
_UNUSED: Mapping[str, Mapping[str, Any]] = {
    "torch.utils.cpp_extension": {"CUDA_HOME": None, "load_inline": None},
    "megatron.core.optimizer": {"OptimizerConfig": type("OptimizerConfig", (), {})},
}


with replaced(torch, "compile", _uncompiled), stand_ins({**dict.fromkeys(_OPTIONAL), **_UNUSED}):
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
