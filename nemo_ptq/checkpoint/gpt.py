# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Megatron's GPTModel, built from the fields of NeMo's configuration without NeMo.

NeMo's additions to Megatron's classes are in :data:`_FINISHING`, and in the layers' spec.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from nemo_ptq.checkpoint.layer_spec import (
    HAVE_TRANSFORMER_ENGINE,
    LocalAndGlobalRotary,
    ShortOrLongRotary,
    calibration_layer_spec,
    has_gemma3_attention,
)
from nemo_ptq.models.hugging_face import NEMO
from nemo_ptq.models.spec import LongRope, ModelSpec, RotaryScaling, spec_of
from nemo_ptq.parallel.attributes import replaced
from nemo_ptq.parallel.megatron import (
    AttnBackend,
    GPTModel,
    LanguageModule,
    RotaryEmbedding,
    TransformerConfig,
    parallel_state,
)


@torch.jit.script  # as in NeMo, whose bits these are
def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)))


def openai_gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of GELU, of any shape."""
    return _tanh_gelu(x)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """The square of ReLU, of any shape."""
    return F.relu(x).pow(2)


# By their names in a context. Servers compute the tanh approximation of "gelu", and so do Megatron's fused kernels.
ACTIVATION_FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": openai_gelu,
    "openai_gelu": openai_gelu,
    "squared_relu": squared_relu,
}


def settings_for_calibration(
    fields: Mapping[str, Any], device: torch.device, dtype: torch.dtype, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields that replace the training machine's settings for calibration on this one.

    Args:
        fields: The fields of NeMo's configuration.
        device: Where the model will live.
        dtype: Data type in which its weights are held, bfloat16 or float16.
        overrides: Parallel sizes and other fields to set.
    """
    settings: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # So that nothing asks for CUDA's memory while the model is built on the meta device.
        "use_cpu_initialization": True,
        # The weights are read from the checkpoint, so initialising them first would gain nothing.
        "perform_initialization": False,
        "sequence_parallel": False,
        "context_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        "tp_comm_overlap": False,
        "deterministic_mode": False,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "cpu_offloading": False,
        "fp8": None,
        "enable_cuda_graph": False,
        "attention_backend": AttnBackend.auto,
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **overrides,
    }
    if not HAVE_TRANSFORMER_ENGINE:
        settings |= {
            "apply_rope_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
            "use_te_rng_tracker": False,
            "moe_permute_fusion": False,
            "use_transformer_engine_full_layer_spec": False,
        }
    if device.type == "cpu":
        # The all-to-all dispatcher orders its copies with CUDA streams.
        settings["moe_token_dispatcher_type"] = "allgather"
    if fields.get("activation_func") is F.gelu:
        settings["activation_func"] = openai_gelu
    return settings


def make_config(fields: Mapping[str, Any]) -> TransformerConfig:
    """Makes Megatron's configuration; fields that only NeMo's has become further attributes of it.

    Args:
        fields: Those of NeMo's configuration, functions and data types among them as such.
    """
    names = {field.name for field in dataclasses.fields(TransformerConfig) if field.init}
    config = TransformerConfig(**{name: value for name, value in fields.items() if name in names})
    for name in fields.keys() - names:
        setattr(config, name, fields[name])
    return config


def build_gpt(config: TransformerConfig, model_class: str) -> GPTModel:
    """Builds this rank's part of a model without memory for its weights: they are on torch's meta device.

    Args:
        config: From :func:`make_config`, with ``vocab_size``.
        model_class: NeMo's class of the model, one of :data:`MODEL_CLASSES`.
    """
    spec = spec_of(vars(config), config.vocab_size)
    if spec.long_rope is not None:
        _multiply_rotation(config, spec.long_rope.attention_factor)
    # Where stages share the embedding Megatron exchanges it between them, which the meta device has none of.
    with replaced(LanguageModule, "setup_embeddings_and_output_layer", lambda module: None), torch.device("meta"):
        module = GPTModel(
            config,
            transformer_layer_spec=calibration_layer_spec(config),
            vocab_size=config.vocab_size,
            max_sequence_length=spec.seq_length,
            **shared_arguments(config, spec),
        )
        if spec.rotary_scaling is not None:
            rotary = module.rotary_pos_emb
            rotary.inv_freq = stretched(rotary.inv_freq, spec.rotary_scaling)
        if has_gemma3_attention(config):
            module.rotary_pos_emb = _gemma3_rotary(config)
        if spec.long_rope is not None:
            module.rotary_pos_emb = _long_rotary(config, spec, spec.long_rope)
    _FINISHING[model_class](module)
    return module


def shared_arguments(config: Any, spec: ModelSpec) -> dict[str, Any]:
    """Returns the arguments that Megatron's GPTModel and MambaModel have in common, on this pipeline stage.

    Args:
        config: Megatron's or NeMo's configuration.
        spec: The model that it describes.
    """
    return {
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "position_embedding_type": spec.position_embedding_type,
        "rotary_percent": spec.rotary_percent,
        "rotary_base": spec.rotary_base,
        "seq_len_interpolation_factor": getattr(config, "seq_len_interpolation_factor", None),
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }


def unbuildable(error: Exception) -> str:
    """Says that a model or its tokenizer cannot be made, and why."""
    reason = str(error).partition("\n")[0] or type(error).__name__
    return (
        f"the model and tokenizer that the checkpoint describes cannot be made ({reason}): copy it again, or give "
        "another tokenizer with tokenizer_path"
    )


def stretched(frequencies: torch.Tensor, scaling: RotaryScaling) -> torch.Tensor:
    """Applies Llama 3.1's scaling to the frequencies of a rotary embedding.

    Args:
        frequencies: float32 (head size / 2).
        scaling: Waves that are longer than its context are stretched by its factor, much shorter ones are kept, and
            those between are interpolated.
    """
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    lengths = 2 * math.pi / frequencies
    kept = (context / lengths - low) / (high - low)
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    is_long, is_short = lengths > context / low, lengths < context / high
    return torch.where(is_long, frequencies / scaling.factor, torch.where(is_short, frequencies, between))


def _gemma3_rotary(config: Any) -> LocalAndGlobalRotary:
    make = partial(
        RotaryEmbedding,
        kv_channels=config.kv_channels,
        rotary_percent=1.0,
        rotary_interleaved=config.rotary_interleaved,
        seq_len_interpolation_factor=getattr(config, "seq_len_interpolation_factor", None),
        use_cpu_initialization=True,
    )
    local, whole = (make(rotary_base=base) for base in config.rotary_base)
    whole.inv_freq /= config.rope_scaling_factor
    return LocalAndGlobalRotary(local, whole)


def _long_rotary(config: Any, spec: ModelSpec, scaling: LongRope) -> ShortOrLongRotary:
    def divided(factors: Sequence[float]) -> RotaryEmbedding:
        rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=spec.rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=spec.rotary_base,
            use_cpu_initialization=True,
        )
        rotary.inv_freq /= torch.tensor(factors, dtype=torch.float32, device=rotary.inv_freq.device)
        return rotary

    return ShortOrLongRotary(divided(scaling.short_factors), divided(scaling.long_factors), scaling.context)


def _multiply_rotation(config: Any, factor: float) -> None:
    """Has Megatron multiply the cosines and sines of the rotary embedding by a factor.

    It takes YaRN's, (0.1 * mscale * ln(scaling factor) + 1) / (0.1 * mscale_all_dim * ln(scaling factor) + 1), from the
    configuration.
    """
    config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.e, 10 * (factor - 1), 0.0
    config.apply_rope_fusion = False  # Transformer Engine's has no such factor


def _is_finished(module: Any) -> None:
    """The addition of most NeMo classes to Megatron's model: none."""


def _finish_gemma(module: Any) -> None:
    # The factor has the data type of the states: it is rounded before it is applied.
    _scale_embedding(module, lambda states: torch.tensor(module.config.hidden_size**0.5, dtype=states.dtype))


def _finish_gemma2(module: Any) -> None:
    _finish_gemma(module)
    cap = module.config.final_logit_softcapping
    if module.post_process and cap:
        module.output_layer.register_forward_hook(partial(_cap, cap))


def _finish_gemma3(module: Any) -> None:
    _scale_embedding(module, lambda states: module.config.hidden_size**0.5)


def _scale_embedding(module: Any, factor: Callable[[torch.Tensor], Any]) -> None:
    if module.pre_process:
        module.embedding.register_forward_hook(lambda _, __, states: states * factor(states))


def _cap(cap: float, _: Any, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    logits, bias = output
    return cap * torch.tanh(logits / cap), bias


_FINISHING: Mapping[str, Callable[[Any], None]] = {
    f"{NEMO}base.GPTModel": _is_finished,
    f"{NEMO}llama.LlamaModel": _is_finished,
    f"{NEMO}mistral.MistralModel": _is_finished,
    f"{NEMO}mixtral.MixtralModel": _is_finished,
    f"{NEMO}qwen2.Qwen2Model": _is_finished,
    f"{NEMO}qwen3.Qwen3Model": _is_finished,
    f"{NEMO}phi3mini.Phi3Model": _is_finished,
    f"{NEMO}starcoder.StarcoderModel": _is_finished,
    f"{NEMO}starcoder2.Starcoder2Model": _is_finished,
    f"{NEMO}nemotron.NemotronModel": _is_finished,
    f"{NEMO}gemma.GemmaModel": _finish_gemma,
    f"{NEMO}gemma2.Gemma2Model": _finish_gemma2,
    f"{NEMO}gemma3.Gemma3Model": _finish_gemma3,
}
HYBRID_CLASS = f"{NEMO}ssm.MambaModel"
"""NeMo's class of hybrids with state spaces, which :mod:`~nemo_ptq.checkpoint.hybrid_model` builds."""
MODEL_CLASSES = frozenset({*_FINISHING, HYBRID_CLASS})
"""NeMo's model classes that can be built without NeMo."""
