# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Small transformers models of every family: as models to write, and as the forward pass to compare with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PreTrainedModel,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from .qnemo_writer import Layer, Model, Recipe, Weights, dequantized_linears, prequant_scale

VOCAB = 131
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "attn_implementation": "eager",
}


def _build(family: str) -> PreTrainedModel:
    if family in ("llama", "llama_linear", "llama3", "llama_tied", "llama_head_size", "llama_bias"):
        extra: dict[str, Any] = {"tie_word_embeddings": family == "llama_tied"}
        if family == "llama3":
            extra |= {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500.0}
        if family == "llama_linear":
            extra |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        if family == "llama_head_size":
            extra |= {"head_dim": 128}
        if family == "llama_bias":
            extra |= {"attention_bias": True, "mlp_bias": True}
        return LlamaForCausalLM(LlamaConfig(**_SIZES, **extra))
    if family == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
        return MixtralForCausalLM(MixtralConfig(**_SIZES, **experts))
    if family == "gemma":
        sizes = {**_SIZES, "num_key_value_heads": 1}
        return GemmaForCausalLM(GemmaConfig(**sizes, head_dim=128, hidden_activation="gelu_pytorch_tanh"))
    if family == "starcoder2":
        no_dropout = {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None}
        return Starcoder2ForCausalLM(Starcoder2Config(**_SIZES, **no_dropout, tie_word_embeddings=False))
    if family == "nemotron":
        return NemotronForCausalLM(NemotronConfig(**_SIZES, partial_rotary_factor=0.5, head_dim=64))
    if family == "gpt_swiglu":
        return StableLmForCausalLM(StableLmConfig(**_SIZES, partial_rotary_factor=0.25))
    assert family == "starcoder"
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=VOCAB, n_embd=256, n_inner=512, n_layer=2, n_head=4, n_positions=97, attn_implementation="eager"
        )
    )


FAMILIES = (
    "llama",
    "llama_linear",
    "llama3",
    "llama_tied",
    "llama_head_size",
    "llama_bias",
    "mixtral",
    "gemma",
    "starcoder2",
    "nemotron",
    "gpt_swiglu",
    "starcoder",
)


def build(family: str) -> PreTrainedModel:
    """A model of the family with seeded random weights, norms and biases included, in float32."""
    torch.manual_seed(0)
    model = _build(family).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or "ln_" in name or name.endswith("bias") else 0.06
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def _norm(module: Any, plus_one: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = getattr(module, "bias", None)
    return module.weight.detach() + float(plus_one), None if bias is None else bias.detach()


def _linear(*modules: Any) -> Weights:
    weight = torch.cat([module.weight.detach() for module in modules])
    biased = modules[0].bias is not None
    return Weights(weight, torch.cat([module.bias.detach() for module in modules]) if biased else None)


def _linear_modules(family: str, layer: Any) -> dict[str, tuple[nn.Module, ...]]:
    """The reference's modules behind each linear layer of the format (those that are stacked are several)."""
    if family == "starcoder":
        attention, mlp = layer.attn, layer.mlp
        return {
            "attention.qkv": (attention.c_attn,),
            "attention.dense": (attention.c_proj,),
            "mlp.fc": (mlp.c_fc,),
            "mlp.proj": (mlp.c_proj,),
        }
    attention = layer.self_attn
    modules = {
        "attention.qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
        "attention.dense": (attention.o_proj,),
    }
    if family == "mixtral":
        return modules
    if family == "starcoder2":
        return modules | {"mlp.fc": (layer.mlp.c_fc,), "mlp.proj": (layer.mlp.c_proj,)}
    if family == "nemotron":
        return modules | {"mlp.fc": (layer.mlp.up_proj,), "mlp.proj": (layer.mlp.down_proj,)}
    return modules | {
        "mlp.fc": (layer.mlp.gate_proj,),
        "mlp.gate": (layer.mlp.up_proj,),
        "mlp.proj": (layer.mlp.down_proj,),
    }


def _decoder(family: str, model: Any) -> tuple[Any, Any, Any]:
    if family == "starcoder":
        return model.transformer, model.transformer.h, model.transformer.ln_f
    return model.model, model.model.layers, model.model.norm


def to_model(family: str, model: Any) -> Model:
    """The reference model in the terms of the format."""
    hf, (decoder, layers, final_norm) = model.config, _decoder(family, model)
    plus_one = family in ("gemma", "nemotron")
    starcoder = family == "starcoder"
    converted = []
    for layer in layers:
        linears = {name: _linear(*modules) for name, modules in _linear_modules(family, layer).items()}
        router = None
        if family == "mixtral":
            experts = layer.block_sparse_moe.experts
            up_gate = [torch.cat([expert.w3.weight, expert.w1.weight]).detach() for expert in experts]
            linears["mlp.fc"] = Weights(torch.stack(up_gate))
            linears["mlp.proj"] = Weights(torch.stack([expert.w2.weight.detach() for expert in experts]))
            router = layer.block_sparse_moe.gate.weight.detach()
        first = layer.ln_1 if starcoder else layer.input_layernorm
        second = layer.ln_2 if starcoder else layer.post_attention_layernorm
        converted.append(Layer(_norm(first, plus_one), _norm(second, plus_one), linears, router))
    rope = not starcoder
    scaling = getattr(hf, "rope_scaling", None)
    config: dict[str, Any] = {
        "architecture": "GPTForCausalLM",
        "decoder": "gpt",
        "num_hidden_layers": len(layers),
        "num_attention_heads": hf.num_attention_heads,
        "num_key_value_heads": 1 if starcoder else hf.num_key_value_heads,
        "hidden_size": hf.hidden_size,
        "head_size": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "intermediate_size": hf.n_inner if starcoder else hf.intermediate_size,
        "vocab_size": VOCAB,
        "max_position_embeddings": hf.max_position_embeddings,
        "position_embedding_type": "rope_gpt_neox" if rope else "learned_absolute",
        "rotary_pct": getattr(hf, "partial_rotary_factor", 1.0) if rope else 1.0,
        "norm_epsilon": 1e-5,
        "rmsnorm": family.startswith(("llama", "mixtral", "gemma")),
        "bias": converted[0].linears["attention.dense"].bias is not None,
        "hidden_act": {"nemotron": "squared-relu", "gpt_swiglu": "swiglu"}.get(family, "gelu"),
    }
    if rope:
        config["rotary_base"] = hf.rope_theta
    if scaling:
        numbers = {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
        config["rotary_scaling"] = {"type": scaling["rope_type"], **numbers}
    if family.startswith(("llama", "mixtral")):
        config |= {"architecture": "LlamaForCausalLM", "decoder": "llama", "hidden_act": "silu"}
    if family == "llama_bias":
        config |= {"attn_bias": True, "mlp_bias": True}
    if family == "mixtral":
        config["moe"] = {"num_experts": 4, "top_k": 2, "normalization_mode": 1}
        config["hidden_act"] = "swiglu"
    if family == "gemma":
        config |= {"architecture": "GemmaForCausalLM", "decoder": "gemma", "hidden_act": "openai-gelu"}
    for name in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"):
        config["norm_epsilon"] = getattr(hf, name, config["norm_epsilon"])
    return Model(
        config,
        (decoder.wte if starcoder else decoder.embed_tokens).weight.detach(),
        tuple(converted),
        _norm(final_norm, plus_one),
        None if hf.tie_word_embeddings else model.lm_head.weight.detach(),
        decoder.wpe.weight.detach() if starcoder else None,
    )


def _round_to(values: torch.Tensor, scale: float, algorithm: str) -> torch.Tensor:
    """What a quantized input becomes; written without the reader's functions."""
    if algorithm == "int8_sq":
        return (values / scale).round().clip(-128, 127) * scale
    if algorithm in ("fp8", "w4a8_awq"):
        return (values / scale).clip(-448, 448).to(torch.float8_e4m3fn).float() * scale
    if algorithm == "nvfp4":
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        blocks = values.reshape(*values.shape[:-1], -1, 16)
        step = (blocks.abs().amax(-1, keepdim=True) / 6 / scale).to(torch.float8_e4m3fn).float() * scale
        nearest = grid[((blocks / step).abs()[..., None] - grid).abs().argmin(-1)]
        return (nearest * blocks.sign() * step).reshape(values.shape)
    return values


def _input_hook(prequant: torch.Tensor | None, scale: float, algorithm: str) -> Callable[..., tuple[torch.Tensor]]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        values = inputs[0] if prequant is None else inputs[0] * prequant
        return (_round_to(values, scale, algorithm),)

    return hook


class _QuantizingCache(DynamicCache):
    """A key/value cache that stores FP8, as a server's does."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._scale = scale

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(_round_to(key, self._scale, "fp8"), _round_to(value, self._scale, "fp8"), *args, **kwargs)


def fake_quantize(family: str, reference: PreTrainedModel, model: Model, recipe: Recipe) -> None:
    """Turns the reference into what a server computes: dequantized weights, inputs rounded before every linear."""
    largest = {"fp8": 448, "w4a8_awq": 448, "int8_sq": 127, "nvfp4": 448 * 6}.get(recipe.algorithm, 1)
    scale = recipe.activation_amax / largest
    smoothing = recipe.algorithm in ("int8_sq", "int4_awq", "w4a8_awq")
    _, layers, _ = _decoder(family, reference)
    with torch.no_grad():
        for layer, weights in zip(layers, dequantized_linears(model, recipe), strict=True):
            by_module = [
                (module, part)
                for name, modules in _linear_modules(family, layer).items()
                for module, part in zip(modules, weights[name].split([m.weight.shape[0] for m in modules]), strict=True)
            ]
            if family == "mixtral":
                for index, expert in enumerate(layer.block_sparse_moe.experts):
                    up, gate = weights["mlp.fc"][index].chunk(2)
                    by_module += [(expert.w3, up), (expert.w1, gate), (expert.w2, weights["mlp.proj"][index])]
            for module, weight in by_module:
                module.weight.copy_(weight)
                prequant = prequant_scale(weight.shape[1], torch.float32) if smoothing else None
                module.register_forward_pre_hook(_input_hook(prequant, scale, recipe.algorithm))


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The reference's logits, with its cache in FP8 where the recipe says so."""
    cache = _QuantizingCache(recipe.kv_scale) if recipe.kv_cache == "FP8" else None
    return model(tokens, past_key_values=cache, use_cache=cache is not None).logits
