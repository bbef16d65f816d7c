# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The transformer layer that is calibrated: ModelOpt's Megatron spec, on Transformer Engine or on plain torch."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from megatron.core.post_training.modelopt.layers import Norm
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False


class _Float32Norm(torch.nn.Module):
    """What :class:`TorchLayerNorm` and :class:`TorchRMSNorm` share: the gain, its convention, and float32 arithmetic.

    Parameters have the names that Transformer Engine gives them, ``weight`` and ``bias``.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    @property
    def gain(self) -> torch.Tensor:
        """float32 (hidden size): the factor applied after normalising, whatever the convention of ``weight``."""
        return self.weight.float() + 1.0 if self.zero_centered_gamma else self.weight.float()


class TorchLayerNorm(_Float32Norm):
    """LayerNorm with a bias over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of ``x`` (any shape), keeping its dtype."""
        assert self.bias is not None
        return F.layer_norm(x.float(), self.weight.shape, self.gain, self.bias.float(), self.eps).to(x.dtype)


class TorchRMSNorm(_Float32Norm):
    """RMSNorm over the last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of ``x`` (any shape), keeping its dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.gain, self.eps).to(x.dtype)


class TorchNorm:
    """Builds the norm that ``config.normalization`` names ("LayerNorm" or "RMSNorm") in plain torch.

    Unlike Megatron's own wrapper of torch's norms it takes ``layernorm_zero_centered_gamma``, where the stored weight
    is the gain minus one. Megatron's specs call for a class, hence ``__new__``.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        """Builds it, with the arguments that Megatron gives its norms."""
        norms = {"LayerNorm": TorchLayerNorm, "RMSNorm": TorchRMSNorm}
        if config.normalization not in norms:
            raise ValueError(f"normalization={config.normalization!r} is not supported; use one of {sorted(norms)}")
        return norms[config.normalization](config, hidden_size, eps)


class TorchCoreAttention(MegatronModule):
    """Causal attention through ``torch.nn.functional.scaled_dot_product_attention``, on any device.

    Takes the constructor arguments that Megatron gives its core attention modules. Grouped queries, a softmax scale
    and a sliding window follow the config; dropout is never applied.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.window = config.window_size[0] if config.window_size else -1

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        """Attends causally.

        Args:
            query: (sequence, batch, heads, head size).
            key: (sequence, batch, groups, head size).
            value: (sequence, batch, groups, head size).
            attention_mask: Ignored: calibration sequences have no padding.

        Returns:
            (sequence, batch, heads * head size).
        """
        sequence, batch = query.shape[:2]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = None
        if 0 <= self.window < sequence - 1:
            ones = torch.ones(sequence, sequence, dtype=torch.bool, device=query.device)
            mask = ones.tril().triu(-self.window)
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


def _on_plain_torch(layer: ModuleSpec) -> ModuleSpec:
    """Replaces the Transformer Engine parts of one layer's spec."""

    def norm(module: Any) -> Any:
        return TorchNorm if module is Norm else module

    submodules = layer.submodules
    attention = submodules.self_attention
    attention = replace(
        attention,
        submodules=replace(
            attention.submodules,
            core_attention=(
                TorchCoreAttention
                if attention.submodules.core_attention is TEDotProductAttention
                else attention.submodules.core_attention
            ),
            q_layernorm=norm(attention.submodules.q_layernorm or IdentityOp),
            k_layernorm=norm(attention.submodules.k_layernorm or IdentityOp),
        ),
    )
    return replace(
        layer,
        submodules=replace(
            submodules,
            input_layernorm=norm(submodules.input_layernorm),
            pre_mlp_layernorm=norm(submodules.pre_mlp_layernorm),
            self_attention=attention,
        ),
    )


def calibration_layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Returns the spec of this pipeline stage's layers, with the state-dict names of a Transformer Engine checkpoint.

    With Transformer Engine installed these are ModelOpt's layers as they are; without it the norms and the core
    attention are plain torch, so that the same layer runs on a CPU.
    """
    spec = get_gpt_modelopt_spec(config, remap_te_layernorm=True)
    if HAVE_TRANSFORMER_ENGINE:
        return spec
    return replace(spec, layer_specs=[_on_plain_torch(layer) for layer in spec.layer_specs], layer_norm=TorchNorm)
