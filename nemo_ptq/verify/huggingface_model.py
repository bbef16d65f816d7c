# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as the forward pass sees it: unquantized, ModelOpt's, or compressed-tensors'."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.config import ModelConfig, Moe, RotaryScaling
from nemo_ptq.verify.huggingface import HuggingFaceDirectory
from nemo_ptq.verify.linear import Stack, StoredLinear, Tensors, stored_linear

# Names of a layer's modules here, and Hugging Face's; outputs of several stand one after the other.
Names = Mapping[str, tuple[str, ...]]

_LLAMA: Names = {
    "vocab_embedding": ("model.embed_tokens",),
    "ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
    "input_layernorm": ("model.layers.{layer}.input_layernorm",),
    "post_layernorm": ("model.layers.{layer}.post_attention_layernorm",),
    "attention.qkv": tuple(f"model.layers.{{layer}}.self_attn.{row}_proj" for row in "qkv"),
    "attention.dense": ("model.layers.{layer}.self_attn.o_proj",),
    "mlp.fc": ("model.layers.{layer}.mlp.gate_proj",),
    "mlp.gate": ("model.layers.{layer}.mlp.up_proj",),
    "mlp.proj": ("model.layers.{layer}.mlp.down_proj",),
}
_MIXTRAL: Names = {
    **_LLAMA,
    "mlp.router": ("model.layers.{layer}.block_sparse_moe.gate",),
    "mlp.fc": tuple(f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.w{part}" for part in (3, 1)),
    "mlp.proj": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",),
}
_STARCODER2: Names = {
    **_LLAMA,
    "mlp.fc": ("model.layers.{layer}.mlp.c_fc",),
    "mlp.proj": ("model.layers.{layer}.mlp.c_proj",),
}
_NEMOTRON: Names = {**_LLAMA, "mlp.fc": ("model.layers.{layer}.mlp.up_proj",)}
_BIGCODE: Names = {
    "vocab_embedding": ("transformer.wte",),
    "position_embedding": ("transformer.wpe",),
    "ln_f": ("transformer.ln_f",),
    "lm_head": ("lm_head",),
    "input_layernorm": ("transformer.h.{layer}.ln_1",),
    "post_layernorm": ("transformer.h.{layer}.ln_2",),
    "attention.qkv": ("transformer.h.{layer}.attn.c_attn",),
    "attention.dense": ("transformer.h.{layer}.attn.c_proj",),
    "mlp.fc": ("transformer.h.{layer}.mlp.c_fc",),
    "mlp.proj": ("transformer.h.{layer}.mlp.c_proj",),
}


@dataclass(frozen=True)
class Architecture:
    """What one of Hugging Face's model classes computes.

    Attributes:
        decoder: As in :class:`~nemo_ptq.verify.config.ModelConfig`.
        names: Its modules.
        settings: Its names of the settings that not all classes call the same.
        fixed: Settings that its config.json cannot vary, whatever it says.
        zero_centered: Whether the gains of norms are stored minus one.
    """

    decoder: str
    names: Names
    settings: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    zero_centered: bool = False


_LLAMA_LIKE = Architecture("llama", _LLAMA)
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA_LIKE,
    "MistralForCausalLM": _LLAMA_LIKE,
    "MixtralForCausalLM": Architecture("llama", _MIXTRAL),
    # Early files of Gemma say "gelu" and mean the approximation, as all readers know.
    "GemmaForCausalLM": Architecture("gemma", _LLAMA, fixed={"hidden_act": "gelu_pytorch_tanh"}, zero_centered=True),
    "Starcoder2ForCausalLM": Architecture("gpt", _STARCODER2, {"norm_epsilon": "norm_epsilon"}),
    "NemotronForCausalLM": Architecture("gpt", _NEMOTRON, {"norm_epsilon": "norm_eps"}, zero_centered=True),
    "GPTBigCodeForCausalLM": Architecture(
        "gpt",
        _BIGCODE,
        {"norm_epsilon": "layer_norm_epsilon", "intermediate_size": "n_inner", "hidden_act": "activation_function"},
    ),
}


@dataclass(frozen=True)
class HuggingFaceWeights:
    """A Hugging Face directory under the names of a qnemo directory.

    Attributes:
        directory: The files.
        architecture: What its model computes.
        config: The model's sizes.
    """

    directory: HuggingFaceDirectory
    architecture: Architecture
    config: ModelConfig

    def tensor(self, name: str) -> torch.Tensor:
        """Reads an unquantized tensor; gains of norms as they multiply."""
        module, _, kind = name.rpartition(".")
        (stored,) = self._modules(module)
        found = self.directory.tensor(f"{stored}.{kind}")
        is_gain = module.endswith(("layernorm", "ln_f")) and kind == "weight"
        return found.float() + 1.0 if is_gain and self.architecture.zero_centered else found

    def linear(self, name: str, device: torch.device) -> Stack:
        """Reads a linear layer, all of its parts."""
        stack = tuple(self._stored(module, device) for module in self._modules(name))
        if name.endswith("attention.qkv") and self._has_fused_heads:
            return tuple(stored.with_rows(self._sort_heads) for stored in stack)
        return stack

    def experts(self, name: str, device: torch.device) -> list[Stack]:
        """Reads the same linear layer of every expert."""
        assert self.config.moe is not None
        return [
            tuple(self._stored(module, device) for module in self._modules(name, expert))
            for expert in range(self.config.moe.num_experts)
        ]

    def kv_cache(self, layer: int, device: torch.device) -> tuple[Tensors, Tensors] | None:
        """What a layer's cache does to keys and to values."""
        quantization = self.directory.quantization
        if quantization is None or quantization.kv_cache is None:
            return None
        modules = self._modules(f"transformer.layers.{layer}.attention.qkv")
        if len(modules) != 3:
            raise PtqError(
                f"{self.directory.path}: the scales of a KV cache belong to k_proj and v_proj, and it has none"
            )
        key, value = (
            partial(dq.fake_quantize_fp8, scale=self.directory.tensor(quantization.kv_cache(module)).to(device))
            for module in modules[1:]
        )
        return key, value

    def _modules(self, name: str, expert: int = 0) -> tuple[str, ...]:
        parts = name.removeprefix("transformer.").split(".")
        layer = int(parts[1]) if parts[0] == "layers" else 0
        module = ".".join(parts[2:] if parts[0] == "layers" else parts)
        return tuple(stored.format(layer=layer, expert=expert) for stored in self.architecture.names[module])

    def _stored(self, module: str, device: torch.device) -> StoredLinear:
        quantization, files = self.directory.quantization, self.directory.files

        def read(field: str) -> torch.Tensor | None:
            # What else is asked for is in some formats, or with some layers, only.
            is_needed = field not in ("bias", "pre_quant_scale") or f"{module}.{field}" in files
            return self.directory.tensor(f"{module}.{field}").to(device) if is_needed else None

        return stored_linear(None if quantization is None else quantization.algorithm_of(module), read)

    @cached_property
    def _has_fused_heads(self) -> bool:
        """Whether rows come by head: query, key and value of the first, of the second, and so on."""
        return getattr(self.directory.transformers_config, "multi_query", True) is False

    def _sort_heads(self, rows: torch.Tensor) -> torch.Tensor:
        by_head = rows.unflatten(0, (self.config.num_attention_heads, 3, self.config.head_size))
        return by_head.transpose(0, 1).flatten(0, 2)


def open_hugging_face(path: Path) -> HuggingFaceWeights:
    """Opens a Hugging Face directory; nothing but config.json is read, and no code from it is run.

    Raises:
        PtqError: If the architecture is not one of :data:`ARCHITECTURES`, or its quantization is not known.
    """
    directory = HuggingFaceDirectory(path)
    name = str((directory.config.get("architectures") or ["(none given)"])[0])
    if name not in ARCHITECTURES:
        raise PtqError(f"{path} is of architecture {name}, not one of {', '.join(ARCHITECTURES)}")
    if not getattr(directory.transformers_config, "scale_attn_weights", True):
        raise PtqError(f"{path}/config.json has scale_attn_weights false, which the reader does not compute")
    directory.quantization  # noqa: B018 - says what is wrong with it before anything is computed
    return HuggingFaceWeights(directory, ARCHITECTURES[name], _model_config(directory, ARCHITECTURES[name]))


def _model_config(directory: HuggingFaceDirectory, architecture: Architecture) -> ModelConfig:
    hf = directory.transformers_config

    def setting(name: str, hf_name: str) -> Any:
        return architecture.fixed.get(name, getattr(hf, architecture.settings.get(name, hf_name)))

    heads, hidden = hf.num_attention_heads, hf.hidden_size
    multi_query = getattr(hf, "multi_query", None)
    kv_heads = getattr(hf, "num_key_value_heads", None) or (1 if multi_query else heads)
    act = setting("hidden_act", "hidden_act")
    experts = getattr(hf, "num_local_experts", None)
    rotary = "position_embedding" not in architecture.names
    return ModelConfig(
        decoder=architecture.decoder,
        dtype=str(hf.dtype or "float32").removeprefix("torch."),
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=hidden,
        head_size=getattr(hf, "head_dim", None) or hidden // heads,
        intermediate_size=setting("intermediate_size", "intermediate_size") or 4 * hidden,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        norm_epsilon=setting("norm_epsilon", "rms_norm_eps"),
        rmsnorm=architecture.decoder != "gpt",
        # Transformers' "gelu" is exact, where TensorRT-LLM's is an approximation.
        hidden_act={"gelu": "gelu_erf"}.get(act, act),
        position_embedding_type="rope_gpt_neox" if rotary else "learned_absolute",
        rotary_pct=getattr(hf, "partial_rotary_factor", 1.0),
        rotary_base=getattr(hf, "rope_theta", 10000.0),
        rotary_scaling=_rotary_scaling(getattr(hf, "rope_scaling", None)),
        share_embedding_table=bool(hf.tie_word_embeddings),
        moe=Moe(experts, hf.num_experts_per_tok, 1) if experts else None,
    )


def _rotary_scaling(raw: Mapping[str, Any] | None) -> RotaryScaling | None:
    kind = (raw or {}).get("rope_type", (raw or {}).get("type", "default"))
    if raw is None or kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise PtqError(f"config.json has rope_scaling of type {kind!r}, expected linear or llama3")
    known = {field.name for field in fields(RotaryScaling)} - {"type"}
    return RotaryScaling(kind, **{name: value for name, value in raw.items() if name in known})
