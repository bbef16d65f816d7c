# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Megatron's MambaModel as it is calibrated: hybrids of Mamba-2, attention and MLPs, on any device.

Megatron's own mixer needs mamba_ssm's kernels, and with them a GPU. The one here has its parameters and their names,
and computes with :mod:`~nemo_ptq.checkpoint.selective_scan`.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.ssm import mamba_block
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules

from nemo_ptq.checkpoint.gpt import shared_arguments
from nemo_ptq.checkpoint.layer_spec import HAVE_TRANSFORMER_ENGINE, Norm, TorchNorm, core_attention
from nemo_ptq.checkpoint.selective_scan import GatedNorm, selective_scan
from nemo_ptq.models.spec import spec_of
from nemo_ptq.models.state_space import CONV_KERNEL, state_space_of
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.megatron import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    LanguageModule,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
)

# Megatron's gated norm has no other.
_GATED_NORM_EPSILON = 1e-5


class StateSpaceMixer(MegatronModule):
    """Mamba-2's layer between norm and residual, with the parameters that Megatron's ``MambaMixer`` has.

    Tensor-parallel ranks share its heads, and the groups of them that share B and C.

    Args:
        config: The model's configuration.
        layer_number: Counted from 1.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self, config: TransformerConfig, *, layer_number: int, pg_collection: Any, d_model: int, **_: Any
    ) -> None:
        super().__init__(config=config)
        sizes, ranks = state_space_of(vars(config)), pg_collection.tp.size()
        assert sizes is not None, layer_number
        self.layer_number, self.sizes, self.ranks = layer_number, sizes, ranks
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        rows, channels = sum(sizes.in_rows.values()), sum(sizes.conv_rows.values()) // ranks
        self.in_proj = ColumnParallelLinear(
            d_model, rows, init_method=config.init_method, gather_output=False, skip_bias_add=False, **common
        )
        self.conv1d = torch.nn.Conv1d(
            channels, channels, CONV_KERNEL, groups=channels, padding=CONV_KERNEL - 1, dtype=config.params_dtype
        )
        for name in ("A_log", "D", "dt_bias"):
            self.register_parameter(name, torch.nn.Parameter(torch.empty(sizes.heads // ranks, dtype=torch.float32)))
        self.norm = GatedNorm(
            sizes.inner_size // ranks, sizes.groups // ranks, _GATED_NORM_EPSILON, config.params_dtype
        )
        self.out_proj = RowParallelLinear(
            sizes.inner_size,
            d_model,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **common,
        )

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Mixes along the sequence: (sequence, batch, hidden size) in and out."""
        projected = self.in_proj(hidden_states)[0].transpose(0, 1)
        gate, conv, steps = projected.split(self._local(self.sizes.inner_size, None, self.sizes.heads), dim=-1)
        length = conv.shape[1]
        conv = F.silu(self.conv1d(conv.transpose(1, 2))[..., :length]).transpose(1, 2)
        inputs, enter, leave = conv.split(self._local(*self.sizes.conv_rows.values()), dim=-1)
        groups = (self.sizes.groups // self.ranks, -1)
        mixed = selective_scan(
            inputs.unflatten(-1, (-1, self.sizes.head_size)),
            F.softplus(steps.float() + self.dt_bias),
            -torch.exp(self.A_log),
            enter.unflatten(-1, groups),
            leave.unflatten(-1, groups),
            self.D,
        )
        normal = self.norm(mixed.flatten(-2), gate)
        return self.out_proj(normal.transpose(0, 1).contiguous())[0], None

    def _local(self, *sizes: int | None) -> list[int]:
        """This rank's share of sizes; None stands for all channels of the convolution."""
        return [(sum(self.sizes.conv_rows.values()) if size is None else size) // self.ranks for size in sizes]


class HybridModel(MambaModel):
    """Megatron's MambaModel, which can embed tokens without computing any layer, as its GPTModel can."""

    def _preprocess(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, decoder_input: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns embeddings (sequence, batch, hidden size), or the given ones, and the rotary embedding or None."""
        states = self.embedding(input_ids, position_ids) if decoder_input is None else decoder_input
        rotary = self.rotary_pos_emb(len(states)) if self.position_embedding_type == "rope" else None
        return states, rotary


def hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """Returns the spec of a hybrid's layers, with the norms and the attention of GPT's calibrated layers."""
    state_space = MambaLayerSubmodules(Norm, ModuleSpec(StateSpaceMixer), get_bias_dropout_add)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=core_attention(config), linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(MambaLayer, submodules=state_space),
            attention_layer=ModuleSpec(
                TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=Norm,
                    self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=Norm, mlp=ModuleSpec(MLP, submodules=mlp), mlp_bda=get_bias_dropout_add
                ),
            ),
        ),
    )


def is_hybrid(config: TransformerConfig) -> bool:
    """Whether NeMo's configuration is of a model with state spaces."""
    return getattr(config, "hybrid_override_pattern", None) is not None


def build_hybrid(config: Any, vocab_size: int) -> HybridModel:
    """Builds this rank's part of a hybrid without memory for its weights: they are on torch's meta device.

    It is what NeMo's ``SSMConfig.configure_model`` builds where mamba_ssm is installed.

    Args:
        config: NeMo's configuration, or Megatron's with the fields that only NeMo's has as further attributes.
        vocab_size: Rows of the embedding.
    """
    spec = spec_of(vars(config), vocab_size)
    with (
        # Where stages share the embedding Megatron exchanges it between them, which the meta device has none of.
        replaced(LanguageModule, "setup_embeddings_and_output_layer", lambda module: None),
        nullcontext() if HAVE_TRANSFORMER_ENGINE else replaced(mamba_block, "TENorm", TorchNorm),
        torch.device("meta"),
    ):
        model = HybridModel(
            config,
            hybrid_stack_spec(config),
            vocab_size,
            spec.seq_length,
            hybrid_override_pattern=config.hybrid_override_pattern,
            **shared_arguments(config, spec),
        )
    if model.post_process:
        # Under both names: blocks know Megatron's GPT, which calls it so, and modules are listed under the first one.
        norm = model.decoder._modules.pop("final_norm")
        model.decoder.final_layernorm = model.decoder.final_norm = norm
    return model
