# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The transformer layer that is calibrated, of Megatron's own modules: on Transformer Engine or on plain torch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from nemo_ptq.models.mapping import POST_NORMS
from nemo_ptq.parallel.megatron import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    IdentityOp,
    L2Norm,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    MoELayer,
    MoESubmodules,
    RotaryEmbedding,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    SequentialMLP,
    SharedExpertMLP,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_num_layers_to_build,
    get_transformer_layer_offset,
)

try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False

# The names under which a model of Transformer Engine's layers stores norms that are fused into a linear layer.
_FUSED_INPUT_NORM = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_FUSED_MLP_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


class _Float32Norm(torch.nn.Module):
    """Shared part of :class:`TorchLayerNorm` and :class:`TorchRMSNorm`: gain, its convention, float32 arithmetic.

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


if HAVE_TRANSFORMER_ENGINE:
    from megatron.core.post_training.modelopt.layers import Norm
else:
    Norm = TorchNorm


@dataclass(frozen=True)
class _Attention:
    """The settings of a layer's attention.

    Attributes:
        scale: Factor of the scores.
        window: Positions before each one that it attends to; -1 for all.
        cap: Soft limit of the scores; None for no limit.
    """

    scale: float
    window: int = -1
    cap: float | None = None

    @classmethod
    def of(cls, config: TransformerConfig, layer_number: int, softmax_scale: float | None) -> "_Attention":
        """Reads the settings of a layer, counted from 1, from NeMo's configuration.

        NeMo's importers take the window from Hugging Face's setting, in which a position counts as one that it attends
        to itself, and its exporters return it: it is the published value, and servers compute with it.
        Gemma 2's layers with a window are the first, the third and so on, as Hugging Face has them, whatever NeMo's
        class does.
        """
        scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        if has_gemma2_attention(config):
            window = config.window_size[0] - 1 if layer_number % 2 else -1
            return cls(config.query_pre_attn_scalar**-0.5, window, config.attn_logit_softcapping)
        if has_gemma3_attention(config):
            return cls(scale, config.window_size - 1 if is_local_layer(config, layer_number) else -1)
        return cls(scale, config.window_size[0] - 1 if has_window(config) else -1)


def has_window(config: TransformerConfig) -> bool:
    """Whether layers that are all alike attend to a window."""
    return bool(config.window_size) and config.window_size[0] > 0


def has_gemma2_attention(config: TransformerConfig) -> bool:
    """Whether attention is Gemma 2's: capped, and every other layer with a window."""
    return getattr(config, "query_pre_attn_scalar", None) is not None


def has_gemma3_attention(config: TransformerConfig) -> bool:
    """Whether attention is Gemma 3's: most layers have a window, and a rotary embedding of their own."""
    return getattr(config, "interleaved_attn_pattern", None) is not None


def is_local_layer(config: TransformerConfig, layer_number: int) -> bool:
    """Whether a layer of Gemma 3, counted from 1, has a window."""
    return layer_number % sum(config.interleaved_attn_pattern) != 0


class TorchCoreAttention(MegatronModule):
    """Causal attention in plain torch, on any device.

    Takes the constructor arguments that Megatron gives its core attention modules. Grouped queries, a softmax scale,
    a sliding window and a cap of the scores follow the config; dropout is never applied.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.attention = _Attention.of(config, layer_number, softmax_scale)

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
        is_windowed = 0 <= self.attention.window < sequence - 1
        if is_windowed or self.attention.cap is not None:
            mask = torch.ones(sequence, sequence, dtype=torch.bool, device=query.device).tril()
        if mask is not None and is_windowed:
            mask = mask.triu(-self.attention.window)
        if mask is not None and self.attention.cap is not None:
            context = _capped_attention(q, k, v, mask, self.attention.scale, self.attention.cap)
        else:
            context = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.attention.scale, enable_gqa=True
            )
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


def _capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, cap: float
) -> torch.Tensor:
    """Mixes values, (batch, heads, sequence, head size), by float32 scores that are kept between -cap and cap."""
    copies = query.shape[1] // key.shape[1]
    mixed = torch.empty_like(query)
    # One sequence at a time: no fused kernel has a cap, and the scores of a batch would be its largest tensor.
    for q, k, v, into in zip(query, key, value, mixed, strict=True):
        k, v = (states.repeat_interleave(copies, dim=0) for states in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() * scale
        scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, float("-inf"))
        into.copy_(scores.softmax(-1).to(v.dtype) @ v)
    return mixed


class SandwichLayer(TransformerLayer):
    """Megatron's layer with norms of the outputs of attention and MLP, as in Gemma 2 and 3."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for sublayer in ("self_attention", "mlp"):
            norm = Norm(config, config.hidden_size, config.layernorm_epsilon)
            setattr(self, f"post_{sublayer}_layernorm", norm)
            getattr(self, sublayer).register_forward_hook(partial(_normalise, norm))


def _normalise(norm: torch.nn.Module, _: Any, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    states, bias = output
    return norm(states), bias


class LocalOrGlobalSelfAttention(SelfAttention):
    """Gemma 3's attention: it takes one of two rotary embeddings, (2, sequence, 1, 1, head size)."""

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> Any:
        """As Megatron's."""
        own = rotary_pos_emb[0 if is_local_layer(self.config, self.layer_number) else 1]
        return super().forward(*args, rotary_pos_emb=own, **kwargs)


class LocalAndGlobalRotary(torch.nn.Module):
    """Both rotary embeddings of a Gemma 3, as :class:`LocalOrGlobalSelfAttention` takes them.

    Args:
        local: The rotary embedding of layers with a window.
        whole: The rotary embedding of the others.
    """

    def __init__(self, local: RotaryEmbedding, whole: RotaryEmbedding) -> None:
        super().__init__()
        self.local, self.whole = local, whole

    def get_rotary_seq_len(self, *args: Any) -> int:
        """Asks one of them: both are as long."""
        return self.whole.get_rotary_seq_len(*args)

    def forward(self, length: int, **options: Any) -> torch.Tensor:
        """Returns (2, length, 1, 1, head size): the angles of layers with a window, and of the others."""
        # Not by calling them: NeMo's class does not take all the arguments that Megatron gives it.
        embeddings = (self.local, self.whole)
        return torch.stack([RotaryEmbedding.forward(embedding, length, **options) for embedding in embeddings])


class ShortOrLongRotary(torch.nn.Module):
    """A rotary embedding with other frequencies in long sequences than in short ones.

    Args:
        short: The rotary embedding of sequences of up to `context` tokens.
        long: The rotary embedding of longer sequences.
        context: Length up to which sequences are short, in tokens.
    """

    def __init__(self, short: RotaryEmbedding, long: RotaryEmbedding, context: int) -> None:
        super().__init__()
        self.short, self.long, self.context = short, long, context

    def get_rotary_seq_len(self, *args: Any) -> int:
        """Asks one of them: both are as long."""
        return self.short.get_rotary_seq_len(*args)

    def forward(self, length: int, **options: Any) -> torch.Tensor:
        """Returns (length, 1, 1, rotated size): the angles."""
        return (self.long if length > self.context else self.short)(length, **options)


def core_attention(config: TransformerConfig) -> type:
    """Returns the module that attends: Transformer Engine's where it is installed, and attends as servers do."""
    in_torch = has_gemma2_attention(config) or has_gemma3_attention(config) or has_window(config)
    if HAVE_TRANSFORMER_ENGINE and not in_torch:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return TorchCoreAttention


def _attention(config: TransformerConfig) -> ModuleSpec:
    has_qk_norm = config.qk_layernorm or has_gemma3_attention(config)  # NeMo's Gemma 3 has no field for it
    norm = L2Norm if getattr(config, "qk_l2_norm", False) else Norm if has_qk_norm else IdentityOp
    return ModuleSpec(
        module=LocalOrGlobalSelfAttention if has_gemma3_attention(config) else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention(config),
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _linears() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def _dense_mlp() -> ModuleSpec:
    return ModuleSpec(module=MLP, submodules=_linears())


def _experts() -> ModuleSpec:
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=SequentialMLP, submodules=_linears()),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_linears()),
        ),
        metainfo={"fuse_pre_mlp_layernorm": False},
    )


def _layer(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    has_post_norms = has_gemma2_attention(config) or has_gemma3_attention(config)
    return ModuleSpec(
        module=SandwichLayer if has_post_norms else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_attention(config),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=_experts() if has_experts else _dense_mlp(),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                **_FUSED_INPUT_NORM,
                **({} if has_experts else _FUSED_MLP_NORM),
                **(POST_NORMS if has_post_norms else {}),
            },
        ),
    )


def calibration_layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Returns the spec of this pipeline stage's layers, with the state-dict names of a Transformer Engine checkpoint.

    Norms and core attention are Transformer Engine's where it is installed; without it they are plain torch, so that
    the same layer runs on a CPU. Gemma 2 and 3, and models with a window, attend in plain torch everywhere.
    """
    dense, experts = _layer(config, has_experts=False), _layer(config, has_experts=True)
    layers = [experts if has_experts else dense for has_experts in _layers_with_experts(config)]
    first = get_transformer_layer_offset(config)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + get_num_layers_to_build(config)], layer_norm=Norm
    )


def _layers_with_experts(config: TransformerConfig) -> list[bool]:
    """Which layers of the whole model have experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(has_experts) for has_experts in frequency]
