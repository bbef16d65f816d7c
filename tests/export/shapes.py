# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Small models as the exporter sees them: shapes and layouts, without any weights."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import GemmaAttention, ModelSpec
from nemo_ptq.quantization.schemes import SCHEMES, UNQUANTIZED, Scheme

LLAMA = ModelSpec(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_size=16,
    ffn_hidden_size=64,
    vocab_size=37,
    seq_length=50,
    normalization="RMSNorm",
    norm_epsilon=1e-5,
    activation="silu",
    gated_mlp=True,
    linear_bias=False,
    qkv_bias=False,
    qk_norm=False,
    tied_embeddings=False,
    position_embedding_type="rope",
    rotary_percent=1.0,
    rotary_base=10000.0,
    rotary_linear_factor=None,
    rotary_scaling=None,
    num_experts=None,
    experts_per_token=0,
)
MIXTRAL = replace(LLAMA, num_experts=3, experts_per_token=2)
GEMMA = replace(LLAMA, activation="gelu", tied_embeddings=True)
GPT = replace(LLAMA, normalization="LayerNorm", activation="gelu", gated_mlp=False, linear_bias=True, qkv_bias=True)
STARCODER = replace(GPT, position_embedding_type="learned_absolute", tied_embeddings=True, num_query_groups=1)

QWEN2 = replace(LLAMA, qkv_bias=True)
QWEN3 = replace(LLAMA, qk_norm=True)
QWEN3_MOE = replace(MIXTRAL, qk_norm=True)
GEMMA2 = replace(GEMMA, gemma=GemmaAttention(144, 50.0, 30.0, 16, 2, None))
GEMMA3 = replace(GEMMA, gemma=GemmaAttention(16, None, None, 8, 6, 1e4), qk_norm=True, rotary_base=1e6)

SHAPES = {
    "llama": LLAMA,
    "mixtral": MIXTRAL,
    "gemma": GEMMA,
    "gpt": GPT,
    "starcoder": STARCODER,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
}
FAMILIES = {
    "llama": Family("Llama", "Llama", "llama", "silu"),
    "mixtral": Family("Mixtral", "Mixtral", "llama", "swiglu"),
    "gemma": Family("Gemma", "Gemma", "gemma", "openai-gelu"),
    "gpt": Family("GPT", "GPTConfig", "gpt"),
    "starcoder": Family("StarCoder", "Starcoder", "gpt"),
    "qwen2": Family("Qwen 2", "Qwen2", "qwen2", "silu"),
    "qwen3": Family("Qwen 3", "Qwen3", "qwen3", "silu"),
    "qwen3_moe": Family("Qwen 3 MoE", "Qwen3MoE", "qwen3_moe", "swiglu"),
    "gemma2": Family("Gemma 2", "Gemma2", "gemma2", "openai-gelu"),
    "gemma3": Family("Gemma 3", "Gemma3", "gemma3", "openai-gelu"),
}


def scheme_named(quant_algo: str | None) -> Scheme:
    """The scheme with TensorRT-LLM's name, with blocks of 16 where it has blocks."""
    scheme = next(scheme for scheme in SCHEMES if scheme.quant_algo == quant_algo)
    return replace(scheme, block_size=16) if quant_algo in ("W4A16_AWQ", "W4A8_AWQ", "NVFP4") else scheme


def linear_names(shape: ModelSpec) -> list[str]:
    """Megatron's names of a model's linear layers that are quantized."""
    mlp = [f"experts.local_experts.{expert}." for expert in range(shape.num_experts or 0)] or [""]
    parts = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    parts += [f"mlp.{prefix}linear_fc{number}" for prefix in mlp for number in (1, 2)]
    return [f"decoder.layers.{layer}.{part}" for layer in range(shape.num_layers) for part in parts]


def layout(
    shape: ModelSpec, quant_algo: str | None = None, tp: int = 1, pp: int = 1, kv_cache: bool = False
) -> QnemoLayout:
    """The layout of a model whose linear layers are all quantized in one way."""
    scheme = scheme_named(quant_algo)
    schemes = {} if scheme is UNQUANTIZED else dict.fromkeys(linear_names(shape), scheme)
    attention = [f"decoder.layers.{layer}.self_attention.core_attention" for layer in range(shape.num_layers)]
    return QnemoLayout(shape, schemes, frozenset(attention if kv_cache else ()), torch.bfloat16, tp, pp)


@st.composite
def families_and_layouts(draw: st.DrawFn) -> tuple[Family, QnemoLayout]:
    """Draws a family, sizes that it may have, an algorithm, and parallel sizes of the files that divide the model."""
    name = draw(st.sampled_from(sorted(SHAPES)))
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    kv = 1 if name == "starcoder" else draw(st.sampled_from([1, 2, 4, 8]))
    heads = kv * draw(st.integers(1, 3))
    assume(heads % tp == 0 and (kv % tp == 0 or tp % kv == 0))
    sizes: dict[str, Any] = {
        "num_layers": pp * draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_query_groups": kv,
        "hidden_size": 16 * draw(st.integers(1, 3)),
        "ffn_hidden_size": 16 * tp * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(20, 150)),
        "seq_length": draw(st.integers(20, 70)),
    }
    if name in ("llama", "gpt", "qwen2", "qwen3"):
        sizes["tied_embeddings"] = draw(st.booleans())
    if name == "gpt":
        sizes["gated_mlp"] = draw(st.booleans())
    held = [scheme for scheme in SCHEMES if scheme.modelopt_format not in FORMATS["trtllm"].refused]
    algorithms = (None, "FP8") if SHAPES[name].num_experts else [scheme.quant_algo for scheme in held]
    algorithm = draw(st.sampled_from(algorithms))
    drawn = layout(replace(SHAPES[name], **sizes), algorithm, tp, pp, draw(st.booleans()))
    return FAMILIES[name], drawn
