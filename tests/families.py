# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every supported family: true architectures, small sizes, seeded random weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Odd on purpose: real vocabularies are not multiples of anything, and larger than their tokenizer.
VOCAB = 1003
TOKENS = 384
SEED = 20240521

_TEXT = (
    "def add(a, b): return a + b",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Quantization maps weights and activations to fewer bits; calibration finds the scales.",
    "for index in range(10): print(index, index * index)",
)
_CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"

# Widths are multiples of 256, so that AWQ's blocks of 128 divide at TP 2: 8 query and 4 key/value heads of 32.
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
}

_GEMMA_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
_GEMMA_SIZES = _SIZES | _GEMMA_HEADS


@dataclass(frozen=True)
class HuggingFaceFamily:
    """A family with a Hugging Face class.

    Attributes:
        config: Name of the configuration class in transformers.
        arguments: What the tiny model passes to it, the number of layers apart.
        layers: Name of the argument with the number of layers.
        zero_centered: Whether its norms add one to their weights.
    """

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layers: str = "num_hidden_layers"
    zero_centered: bool = False


def _llama3_rope(factor: float) -> dict[str, Any]:
    numbers = {"low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 64}
    return {"rope_type": "llama3", "factor": factor, **numbers}


FAMILIES: Mapping[str, HuggingFaceFamily] = {
    "llama2": HuggingFaceFamily("LlamaConfig", _SIZES),
    "llama3": HuggingFaceFamily("LlamaConfig", _SIZES | {"rope_theta": 500000.0}),
    "llama31": HuggingFaceFamily("LlamaConfig", _SIZES | {"rope_theta": 500000.0, "rope_scaling": _llama3_rope(8.0)}),
    "llama32": HuggingFaceFamily(
        "LlamaConfig",
        _SIZES | {"rope_theta": 500000.0, "rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True},
    ),
    "mistral": HuggingFaceFamily("MistralConfig", _SIZES | {"sliding_window": 128}),
    "mixtral": HuggingFaceFamily("MixtralConfig", _SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2": HuggingFaceFamily("Qwen2Config", _SIZES),
    "qwen3": HuggingFaceFamily("Qwen3Config", _SIZES | {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3_moe": HuggingFaceFamily(
        "Qwen3MoeConfig",
        _SIZES
        | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 256, "norm_topk_prob": True}
        | {"intermediate_size": 768},
    ),
    "phi3": HuggingFaceFamily("Phi3Config", _SIZES | {"pad_token_id": 0}),
    "gemma": HuggingFaceFamily("GemmaConfig", _SIZES | _GEMMA_HEADS, zero_centered=True),
    # TensorRT-LLM's files do not have Gemma 2's window: the tests' texts fit into it, calibration's do not.
    "gemma2": HuggingFaceFamily(
        "Gemma2Config", _GEMMA_SIZES | {"query_pre_attn_scalar": 96, "sliding_window": 24}, zero_centered=True
    ),
    "gemma3": HuggingFaceFamily(
        "Gemma3TextConfig", _GEMMA_SIZES | {"sliding_window_pattern": 2, "sliding_window": 12}, zero_centered=True
    ),
    "starcoder": HuggingFaceFamily(
        "GPTBigCodeConfig",
        # 1 key/value head: the fused projection has 4 + 2 heads of 128
        {
            "vocab_size": VOCAB,
            "n_embd": 512,
            "n_inner": 1024,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
        },
        layers="n_layer",
    ),
    "starcoder2": HuggingFaceFamily("Starcoder2Config", _SIZES | {"tie_word_embeddings": False}),
    "nemotron": HuggingFaceFamily("NemotronConfig", _SIZES, zero_centered=True),
}

# Settings of each family that are not transformers' defaults, so that one which is not read is seen in the logits.
# Windows are shorter than the tests' texts.
TELLING: Mapping[str, dict[str, Any]] = {
    "llama2": {"rope_theta": 3000.0, "rms_norm_eps": 0.3},
    "llama3": {"head_dim": 64},
    "llama31": {"rms_norm_eps": 0.3},
    "llama32": {},
    "mistral": {"rope_theta": 3000.0, "rms_norm_eps": 0.3, "head_dim": 64, "sliding_window": 7},
    "mixtral": {"rope_theta": 3000.0, "rms_norm_eps": 0.3, "num_experts_per_tok": 3},
    "qwen2": {"rope_theta": 3000.0, "rms_norm_eps": 0.3},
    "qwen3": {"rope_theta": 3000.0, "rms_norm_eps": 0.3},
    "qwen3_moe": {"rope_theta": 3000.0, "rms_norm_eps": 0.3, "num_experts_per_tok": 2},
    "phi3": {"rope_theta": 3000.0, "rms_norm_eps": 0.3, "partial_rotary_factor": 0.5, "sliding_window": 7},
    "gemma": {"rope_theta": 3000.0, "rms_norm_eps": 0.3},
    "gemma2": {"rope_theta": 3000.0, "rms_norm_eps": 0.3, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5}
    | {"final_logit_softcapping": 1.0, "sliding_window": 7},
    "gemma3": {"rope_theta": 3000.0, "rms_norm_eps": 0.3, "rope_local_base_freq": 300.0, "query_pre_attn_scalar": 5}
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window": 7},
    "starcoder": {"layer_norm_epsilon": 0.3, "n_inner": 512},
    "starcoder2": {"rope_theta": 3000.0, "norm_epsilon": 0.3, "sliding_window": 7},
    "nemotron": {"rope_theta": 3000.0, "norm_eps": 0.3, "partial_rotary_factor": 0.25},
}
# NeMo's GPT has no Hugging Face class: activation, whether it is gated, whether linear layers have a bias.
GPT_VARIANTS: Mapping[str, tuple[str, bool, bool]] = {
    "gpt": ("gelu", False, True),
    "gpt_geglu": ("gelu", True, False),
    "gpt_swiglu": ("silu", True, False),
}


def make_hf(name: str, directory: Path, num_layers: int = 2, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Make the Hugging Face directory of a family: config.json, model.safetensors, tokenizer.

    Args:
        name: Key of `FAMILIES`.
        directory: Where to.
        num_layers: Number of layers.
        dtype: Name of the weights' torch data type.
        **changes: Arguments of the configuration that differ from the family's.

    Returns:
        `directory`.
    """
    import transformers

    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**family.arguments, family.layers: num_layers, **changes})
    save_random(config, directory, dtype, family.zero_centered)
    make_tokenizer(directory)
    return directory


def save_random(config: Any, directory: Path, dtype: str, zero_centered: bool) -> None:
    """Save a model of transformers' with seeded random weights."""
    import torch
    import transformers

    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
            mean = 0.0 if zero_centered or parameter_name.endswith("bias") else 1.0
            torch.nn.init.normal_(parameter, mean, 0.1)
        if parameter_name.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight")):
            parameter.data.mul_(8)  # as decided as a trained router, so that rounding seldom changes the experts
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def make_tokenizer(directory: Path) -> None:
    """Train a byte-level BPE tokenizer of at most `TOKENS` tokens and save its files."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(directory)


def make_nemo(name: str, directory: Path, num_layers: int = 2) -> Path:
    """Make the NeMo 2.0 checkpoint of a family.

    Args:
        name: Key of `FAMILIES` or of `GPT_VARIANTS`.
        directory: The checkpoint; a family with a Hugging Face class leaves its source next to it, as `<name>.hf`.
        num_layers: Number of layers.

    Returns:
        `directory`.
    """
    if name in GPT_VARIANTS:
        return _make_gpt(name, directory, num_layers)
    from nemo_ptq.checkpoint.huggingface.importer import import_hf

    return import_hf(str(make_hf(name, directory.with_name(f"{directory.name}.hf"), num_layers)), str(directory))


def _make_gpt(name: str, directory: Path, num_layers: int) -> Path:
    import fiddle as fdl
    import torch
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel

    from nemo_ptq.checkpoint.writer import write_context, write_weights

    activation, gated, bias = GPT_VARIANTS[name]
    config = fdl.Config(
        GPTConfig,
        num_layers=num_layers,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=32,
        seq_length=256,
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        activation_func=getattr(torch.nn.functional, activation),
        gated_linear_unit=gated,
        add_bias_linear=bias,
        position_embedding_type="rope",
        rotary_percent=0.5,
        share_embeddings_and_output_weights=False,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    tokenizer = directory.with_name(f"{directory.name}.tokenizer") / "nemo_tokenizer"
    make_tokenizer(tokenizer)
    model = fdl.Config(
        GPTModel, config=config, tokenizer=fdl.Config(AutoTokenizer, pretrained_model_name=str(tokenizer))
    )
    write_weights(directory / "weights", _gpt_parts(num_layers, gated, bias))
    write_context(directory / "context", model)
    return directory


def _gpt_parts(num_layers: int, gated: bool, bias: bool) -> list[Any]:
    import torch

    from nemo_ptq.checkpoint.parts import TensorPart

    generator = torch.Generator().manual_seed(SEED)
    hidden, ffn, qkv, vocab = 256, 512, (8 + 2 * 4) * 32, TOKENS
    fc1 = 2 * ffn if gated else ffn
    norms = {"self_attention.linear_qkv.layer_norm_": hidden, "mlp.linear_fc1.layer_norm_": hidden}
    linears = {
        "self_attention.linear_qkv.": (qkv, hidden),
        "self_attention.linear_proj.": (hidden, hidden),
        "mlp.linear_fc1.": (fc1, hidden),
        "mlp.linear_fc2.": (hidden, ffn),
    }
    layer: dict[str, tuple[int, ...]] = {
        name + kind: (size,) for name, size in norms.items() for kind in ("weight", "bias")
    }
    layer |= {f"{name}weight": shape for name, shape in linears.items()}
    layer |= {f"{name}bias": shape[:1] for name, shape in linears.items() if bias}

    def part(key: str, shape: tuple[int, ...], *position: tuple[int, int]) -> TensorPart:
        tensor = torch.randn(shape, generator=generator).mul(0.06).bfloat16()
        return TensorPart(key, shape, tensor.dtype, lambda: tensor, position)

    return [
        part("embedding.word_embeddings.weight", (vocab, hidden)),
        *(
            part(f"decoder.layers.{name}", shape, (index, num_layers))
            for index in range(num_layers)
            for name, shape in layer.items()
        ),
        part("decoder.final_layernorm.weight", (hidden,)),
        part("decoder.final_layernorm.bias", (hidden,)),
        part("output_layer.weight", (vocab, hidden)),
    ]
