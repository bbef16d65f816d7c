# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""config.json of a TensorRT-LLM checkpoint, from the model's shape and the layout of the files."""

from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.export.trtllm.exclusions import exclude_modules
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.registry import ARCHITECTURES, Family, unknown_to_reader
from nemo_ptq.models.spec import GemmaAttention, ModelSpec
from nemo_ptq.quantization.schemes import the_scheme

_GATED_ACTIVATIONS = {"gelu": "geglu", "silu": "swiglu"}


def hidden_act(shape: ModelSpec, family: Family) -> str:
    """Returns TensorRT-LLM's name of the MLP's activation.

    A gated MLP of decoder "gpt" needs the gated name: with the plain one its reader ignores the gate.
    """
    if family.hidden_act is not None:
        return family.hidden_act
    return _GATED_ACTIVATIONS[shape.activation] if shape.gated_mlp else shape.activation


def check_exportable(shape: ModelSpec, family: Family, tokenizer: Any = None) -> None:
    """Refuses a model that the readers of its decoder would load and compute something else from.

    Raises:
        PtqError: If the model has an activation that they do not know, normalises queries and keys, or has biases that
            its decoder's reader does not expect.
    """
    assert family.decoder is not None
    if problem := unknown_to_reader(family.decoder, shape):
        raise PtqError(problem)


def rotary_scaling(shape: ModelSpec) -> dict[str, Any] | None:
    """Returns how the rotary embedding is stretched, with every number: readers fill gaps with Llama 3.1's."""
    if shape.rotary_scaling is not None:
        scaling = shape.rotary_scaling
        return {
            "type": "llama3",
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    if shape.rotary_linear_factor is not None:
        return {"type": "linear", "rope_type": "linear", "factor": shape.rotary_linear_factor}
    return None


def _gemma_keys(gemma: GemmaAttention) -> dict[str, Any]:
    """Keys that the readers of decoders gemma2 and gemma3 take in addition to the common ones."""
    keys = {"query_pre_attn_scalar": gemma.scalar, "final_logit_softcapping": gemma.logit_cap}
    if gemma.local_base is None:
        return {**keys, "attn_logit_softcapping": gemma.cap}
    local = {"_sliding_window_pattern": gemma.pattern, "sliding_window": gemma.window}
    return {**keys, **local, "rope_local_base_freq": gemma.local_base}


def qnemo_config(layout: QnemoLayout, family: Family, version: str) -> dict[str, Any]:
    """Returns what goes into config.json.

    Args:
        layout: The files.
        family: The model's family.
        version: Our own version.

    Raises:
        PtqError: If the format cannot represent the layers' schemes.
    """
    assert family.decoder is not None
    shape, scheme = layout.shape, the_scheme(layout.schemes.values())
    dtype = str(layout.dtype).removeprefix("torch.")
    quantization: dict[str, Any] = {
        "quant_algo": scheme.quant_algo,
        "kv_cache_quant_algo": "FP8" if layout.kv_cache else None,
    }
    if scheme.quant_algo is not None:
        excluded = exclude_modules(shape, layout.unquantized, layout.pipeline_parallel)
        quantization |= {**scheme.quantization_keys, "exclude_modules": excluded}
    mapping = {
        "world_size": layout.world_size,
        "tp_size": layout.tensor_parallel,
        "pp_size": layout.pipeline_parallel,
    }
    config: dict[str, Any] = {
        "producer": {"name": "nemo_ptq", "version": version},
        "architecture": ARCHITECTURES[family.decoder],
        "decoder": family.decoder,
        "dtype": dtype,
        "logits_dtype": "float16" if dtype == "bfloat16" else dtype,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "hidden_size": shape.hidden_size,
        "head_size": shape.head_size,
        "intermediate_size": shape.ffn_hidden_size,
        "norm_epsilon": shape.norm_epsilon,
        "rmsnorm": shape.normalization == "RMSNorm",
        "vocab_size": layout.vocab_size,
        "max_position_embeddings": shape.seq_length,
        "hidden_act": hidden_act(shape, family),
        "position_embedding_type": "rope_gpt_neox"
        if shape.position_embedding_type == "rope"
        else shape.position_embedding_type,
        "rotary_pct": shape.rotary_percent,
        "rotary_base": shape.rotary_base,
        "rotary_scaling": rotary_scaling(shape),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": shape.tied_embeddings and layout.pipeline_parallel == 1,
        "residual_mlp": False,
        "bias": shape.linear_bias,
        "lm_head_bias": False,
        "rank": layout.world_size - 1,
        "mapping": mapping,
        "quantization": quantization,
    }
    is_qwen = family.decoder.startswith("qwen")
    if family.decoder == "llama" or is_qwen:
        # These decoders' readers ask for the biases of their two halves by other names.
        config |= {"attn_bias": shape.qkv_bias, "mlp_bias": shape.linear_bias}
    if is_qwen:
        config |= {"qwen_type": family.decoder, "seq_length": shape.seq_length}
    if shape.gemma:
        config |= _gemma_keys(shape.gemma)
    if shape.num_experts:
        mapping |= {"moe_tp_size": layout.tensor_parallel, "moe_ep_size": 1}
        # Mode 1 renormalises the chosen experts' probabilities, as Megatron's router does.
        config["moe"] = {"num_experts": shape.num_experts, "top_k": shape.experts_per_token, "normalization_mode": 1}
        if is_qwen:
            config["moe_intermediate_size"] = shape.ffn_hidden_size
    return config
