# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A NeMo 2.0 checkpoint as the forward pass sees it, read without NeMo: unquantized, or with ModelOpt's quantizers.

Weights have Megatron's names and order of rows, and are not packed. Where there are quantizers, weights, inputs and the
KV cache are rounded as these say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify import dequantize as dq
from nemo_ptq.verify.context import model_scaling, read_model_yaml
from nemo_ptq.verify.linear import Stack, StoredLinear, Tensors
from nemo_ptq.verify.model_config import ModelConfig, Moe
from nemo_ptq.verify.nemo.hybrids import hybrid_of
from nemo_ptq.verify.nemo.sharded_tensors import ShardedTensors

_PREFIX = "module."
_LAYERS = "decoder.layers."
_EXPERTS = "mlp.experts.experts."
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTSIDE = {
    "transformer.vocab_embedding.weight": _EMBEDDING,
    "transformer.position_embedding.weight": "embedding.position_embeddings.weight",
    "transformer.ln_f.weight": "decoder.final_layernorm.weight",
    "transformer.ln_f.bias": "decoder.final_layernorm.bias",
}
# What a hybrid has in place of it, and the rows of its layers' state spaces that stand by themselves.
_FINAL_NORM_OF_HYBRIDS = "decoder.final_norm.weight"
_ROWS = ("z", "x", "B", "C", "dt")
_BEFORE_MLP = ("mlp.linear_fc1.layer_norm_{}", "pre_mlp_layernorm.{}")
# Megatron fuses a norm into the linear layer after it, where it can.
_UNQUANTIZED = {
    "input_layernorm": ("self_attention.linear_qkv.layer_norm_{}", "input_layernorm.{}"),
    "post_layernorm": _BEFORE_MLP,
    "attention.q_layernorm": ("self_attention.q_layernorm.{}",),
    "attention.k_layernorm": ("self_attention.k_layernorm.{}",),
    "mlp.router": ("mlp.router.{}",),
    # A hybrid's layers have one norm, whatever they are.
    "norm": tuple(
        f"{linear}.layer_norm_{{}}" for linear in ("mixer.in_proj", "self_attention.linear_qkv", "mlp.linear_fc1")
    ),
    "ssm": ("mixer.{}",),
    "ssm.conv1d": ("mixer.conv1d.{}",),
    "ssm.norm": ("mixer.norm.{}",),
}
# The same, where what attention and MLP return is normalised as well.
_POST_NORMS = {
    "post_layernorm": ("self_attention.linear_proj.post_layernorm.{}",),
    "pre_feedforward_layernorm": _BEFORE_MLP,
    "post_feedforward_layernorm": ("mlp.linear_fc2.post_layernorm.{}",),
}
_LINEARS = {
    "attention.qkv": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "mlp.fc": "mlp.linear_fc1",
    "mlp.gate": "mlp.linear_fc1",
    "mlp.proj": "mlp.linear_fc2",
    "ssm.in_proj": "mixer.in_proj",
    "ssm.out_proj": "mixer.out_proj",
}
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "openai_gelu": "gelu",
    "squared_relu": "squared-relu",
    "relu": "relu",
} | {
    "NemotronHConfigBase.<lambda>": "squared-relu"  # a function without a name, of this class
}
# What decoder gpt calls an activation with a gate.
_WITH_GATE = {"silu": "swiglu", "gelu": "geglu"}
# What the forward pass takes for granted of a model.yaml, where it says anything about it.
_PRESUMED: Mapping[str, Any] = {
    "rotary_interleaved": False,
    "multi_latent_attention": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_output_gate": False,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_shared_expert_intermediate_size": None,
}


@dataclass(frozen=True)
class _Quantizer:
    """One of ModelOpt's quantizers.

    Attributes:
        bits: Bits of an integer, or of exponent and mantissa.
        has_blocks: Whether each block of a few values has a scale of its own.
        amax: float32, (), or of each row (out, 1) or block (out, blocks).
    """

    bits: int | tuple[int, ...]
    has_blocks: bool
    amax: torch.Tensor

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Rounds float32 (..., in) to the grid."""
        if self.bits == (4, 3) and not self.has_blocks:
            return dq.fake_quantize_fp8(values, self.amax / dq.E4M3_MAX)
        if self.bits == (2, 1) and self.has_blocks:
            return dq.fake_quantize_nvfp4(values, self.amax / (dq.E4M3_MAX * dq.E2M1_MAX))
        if isinstance(self.bits, int):
            largest = 2 ** (self.bits - 1) - 1
            scale = self.amax / largest
            if self.has_blocks:
                scale = scale.repeat_interleave(values.shape[-1] // scale.shape[-1], dim=-1)
            return (values / scale).round().clamp(-largest - 1, largest) * scale
        raise PtqError(f"quantizers of num_bits {self.bits} with block_sizes {self.has_blocks} are not known")


def _in_turn(quantizers: Sequence[_Quantizer], weight: torch.Tensor) -> torch.Tensor:
    values = weight.float()
    for quantize in quantizers:
        values = quantize(values)
    return values


@dataclass(frozen=True)
class NemoWeights:
    """A NeMo 2.0 checkpoint under the names of a qnemo directory.

    Attributes:
        config: The model's sizes.
        zero_centered_norms: Whether norms are stored minus one.
        files: The model's tensors.
    """

    config: ModelConfig
    zero_centered_norms: bool
    files: ShardedTensors

    def tensor(self, name: str) -> torch.Tensor:
        """Reads an unquantized tensor; gains of norms as they multiply."""
        match = re.fullmatch(r"transformer\.layers\.(\d+)\.(.*)\.(weight|bias|A_log|D|dt_bias)", name)
        if match is None:
            is_final = self.config.hybrid is not None and name == "transformer.ln_f.weight"
            found = self.files.read(_PREFIX + (_FINAL_NORM_OF_HYBRIDS if is_final else _OUTSIDE[name]))
        else:
            known = _UNQUANTIZED | _POST_NORMS if self.config.post_norms else _UNQUANTIZED
            places = [place.format(match[3]) for place in known[match[2]]]
            candidates = (self._find(place, int(match[1])) for place in places)
            first = next((tensor for tensor in candidates if tensor is not None), None)
            if first is None:
                raise PtqError(f"the checkpoint holds no {' or '.join(places)} of layer {match[1]}")
            found = first
        is_gain = name.endswith(("norm.weight", "ln_f.weight")) and not name.endswith("ssm.norm.weight")
        return found.float() + 1.0 if is_gain and self.zero_centered_norms else found

    def linear(self, name: str, device: torch.device) -> Stack:
        """Reads a linear layer."""
        if name == "lm_head":
            return (StoredLinear(self.files.read(f"{_PREFIX}output_layer.weight").to(device)),)
        _, _, layer, module = name.split(".", 3)
        stored = self._linear(_LINEARS[module], int(layer), None, device)
        if module == "attention.qkv":
            return (stored.with_rows(self._sort_qkv),)
        if self.config.gated and module in ("mlp.fc", "mlp.gate"):
            return (stored.with_rows(lambda rows: rows.chunk(2)[module == "mlp.gate"]),)
        return (stored,)

    def experts(self, name: str, device: torch.device) -> list[Stack]:
        """Reads the same linear layer of every expert."""
        assert self.config.moe is not None
        _, _, layer, module = name.split(".", 3)
        kind = _LINEARS[module].replace("mlp.", _EXPERTS)
        experts = [self._linear(kind, int(layer), expert, device) for expert in range(self.config.moe.num_experts)]
        if module == "mlp.fc":  # [gate; up] in the files
            experts = [stored.with_rows(lambda rows: rows.roll(len(rows) // 2, 0)) for stored in experts]
        return [(stored,) for stored in experts]

    def kv_cache(self, layer: int, device: torch.device) -> tuple[Tensors, Tensors] | None:
        """Returns functions that round a layer's keys and values as its cache does."""
        module = _own("self_attention.core_attention", layer)
        key, value = self._quantizers(module, ("k_bmm_quantizer", "v_bmm_quantizer"), device)
        if (key is None) != (value is None):
            raise PtqError(f"{module}: either keys or values are quantized, expected both or none")
        return None if key is None or value is None else (key, value)

    def _find(self, place: str, layer: int, expert: int | None = None) -> torch.Tensor | None:
        """Reads a tensor of a layer or expert: it stands by itself, in groups of rows, or stacked with all others."""
        own, stacked = _own(place, layer, expert), f"{_PREFIX}{_LAYERS}{place}"
        if self.files.shape(own) is not None:
            return self.files.read(own)
        if self.files.shape(f"{own}_w") is not None:
            return torch.cat([self.files.read(f"{own}_{half}") for half in ("w", "v")])
        groups = [f"{own}.{rows}" for rows in _ROWS if self.files.shape(f"{own}.{rows}") is not None]
        if groups:
            return torch.cat([self.files.read(group) for group in groups])
        if self.files.shape(stacked) is not None:
            return self.files.read(stacked, (layer,) if expert is None else (layer, expert))
        return None

    def _linear(self, kind: str, layer: int, expert: int | None, device: torch.device) -> StoredLinear:
        """Reads a linear layer, its rows in Megatron's order."""
        places = [f"{kind}.{field}" for field in ("weight", "bias", "input_quantizer._pre_quant_scale")]
        found = [self._find(place, layer, expert) for place in places]
        weight, bias, scale = [None if tensor is None else tensor.to(device) for tensor in found]
        module = _own(kind, layer, expert)
        if weight is None:
            raise PtqError(f"the checkpoint holds no {module}.weight")
        # One quantizer of the weight, or several in turn.
        names = ("input_quantizer", "weight_quantizer", "weight_quantizer.0", "weight_quantizer.1")
        quantize_input, *quantizers = self._quantizers(module, names, device)
        enabled = [quantizer for quantizer in quantizers if quantizer is not None]
        return StoredLinear(
            weight,
            partial(_in_turn, enabled) if enabled else None,
            None if bias is None else bias.float(),
            None if scale is None else scale.float(),
            quantize_input,
        )

    def _quantizers(self, module: str, names: Sequence[str], device: torch.device) -> list[_Quantizer | None]:
        """Reads some quantizers of a module; None where there is none, or where it is disabled."""
        states = self.files.extra_state(module).get("modelopt_quantizer_state") or {}

        def read(name: str) -> _Quantizer | None:
            state = states.get(name)
            if state is None or state["_disabled"]:
                return None
            amax = self._range(f"{module}.{name}._amax").float().to(device)
            return _Quantizer(state["_num_bits"], state["_block_sizes"] is not None, amax)

        return [read(name) for name in names]

    def _range(self, name: str) -> torch.Tensor:
        pieces = self.files.pieces(name)
        if all(piece.numel() == 1 for piece in pieces):
            return pieces[0].reshape(())
        if not self.config.gated or ".linear_fc1." not in name:
            return self.files.read(name)
        # Each rank has written the amaxes of its rows of the gate and, behind them, those of its other rows.
        halves = zip(*(piece.chunk(2) for piece in pieces), strict=True)
        return torch.cat([rows for half in halves for rows in half])

    def _sort_qkv(self, rows: torch.Tensor) -> torch.Tensor:
        """Turns rows in groups of some queries, a key and a value into all queries, all keys, all values."""
        groups, heads = self.config.num_key_value_heads, self.config.num_attention_heads
        by_group = rows.unflatten(0, (groups, heads // groups + 2, self.config.head_size))
        return torch.cat([part.flatten(0, 2) for part in by_group.split([heads // groups, 1, 1], dim=1)])


def _own(place: str, layer: int, expert: int | None = None) -> str:
    """The full name of what stands by itself in one layer or expert."""
    if expert is not None:
        place = place.replace(_EXPERTS, f"{_EXPERTS}{expert}.")
    return f"{_PREFIX}{_LAYERS}{layer}.{place}"


def open_nemo(path: Path) -> NemoWeights:
    """Opens a NeMo 2.0 checkpoint; only its description and the index of its weights are read.

    Raises:
        PtqError: If it does not describe a model that can be run.
    """
    return read_model(path / "context" / "model.yaml", read_model_yaml(path), ShardedTensors(path))


def read_model(source: Path, description: Mapping[str, Any], files: ShardedTensors) -> NemoWeights:
    """Puts a description and tensors together.

    Args:
        source: Name of the description, for messages.
        description: Content like that of a context's model.yaml.
        files: The tensors, under NeMo's names.

    Raises:
        PtqError: If it does not describe a model that can be run.
    """
    try:
        model = description["config"]
        zero_centered = bool(model.get("layernorm_zero_centered_gamma"))
        return NemoWeights(_model_config(description, model, files), zero_centered, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise PtqError(f"{source} is not of a GPT-like model: {error!r}") from error


def _model_config(description: Mapping[str, Any], model: Mapping[str, Any], files: ShardedTensors) -> ModelConfig:
    for name, presumed in _PRESUMED.items():
        if model.get(name, presumed) != presumed:
            raise PtqError(f"context/model.yaml has {name} {model[name]!r}, which the reader does not compute")
    embedding = files.shape(_PREFIX + _EMBEDDING)
    if embedding is None:
        raise PtqError(f"the checkpoint holds no {_PREFIX}{_EMBEDDING}")
    heads, hidden, experts = model["num_attention_heads"], model["hidden_size"], model.get("num_moe_experts")
    rmsnorm = model["normalization"] == "RMSNorm"
    is_gemma = "gemma" in str(description["_target_"]).lower()
    hybrid = hybrid_of(model)
    decoder = "gemma" if is_gemma else "llama" if rmsnorm and hybrid is None else "gpt"
    target = str(model["activation_func"]["_target_"])
    function = next((name for name in _ACTIVATIONS if "." in name and target.endswith(name)), target.rpartition(".")[2])
    act = _ACTIVATIONS.get(function, function)
    if decoder == "gpt" and model["gated_linear_unit"]:
        act = _WITH_GATE.get(act, act)
    rotary = model["position_embedding_type"] == "rope"
    scalar, pattern = model.get("query_pre_attn_scalar"), model.get("interleaved_attn_pattern")
    window, global_layers = _windows(model)
    *local_base, base = bases if isinstance(bases := model.get("rotary_base", 10000.0), list) else [bases]
    return ModelConfig(
        decoder=decoder,
        dtype="bfloat16" if model.get("bf16") else "float16" if model.get("fp16") else "float32",
        num_hidden_layers=model["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=model.get("num_query_groups") or heads,
        hidden_size=hidden,
        head_size=model.get("kv_channels") or hidden // heads,
        intermediate_size=model.get("moe_ffn_hidden_size") or model.get("ffn_hidden_size") or 4 * hidden,
        vocab_size=embedding[0],
        max_position_embeddings=model["seq_length"],
        norm_epsilon=model["layernorm_epsilon"],
        rmsnorm=rmsnorm,
        hidden_act=act,
        position_embedding_type="rope_gpt_neox" if rotary else model["position_embedding_type"],
        rotary_pct=model.get("rotary_percent", 1.0),
        rotary_base=base,
        rotary_scaling=model_scaling(model) if rotary else None,
        share_embedding_table=bool(model["share_embeddings_and_output_weights"]),
        moe=Moe(experts, model["moe_router_topk"], 1) if experts else None,
        attention_window=window,
        global_layers=global_layers,
        qk_norm=bool(model.get("qk_layernorm") or pattern),
        post_norms=scalar is not None or pattern is not None,
        attention_scale=model.get("softmax_scale") if scalar is None else scalar**-0.5,
        attention_cap=model.get("attn_logit_softcapping"),
        logit_cap=model.get("final_logit_softcapping"),
        local_rotary_base=local_base[0] if local_base else None,
        hybrid=hybrid,
    )


def _windows(model: Mapping[str, Any]) -> tuple[int | None, frozenset[int]]:
    """Positions that each one attends to, itself included, and the layers in which it attends to all before it.

    NeMo's checkpoints have Hugging Face's number, which counts the token as well; -1 stands for no window. Gemma 2 has
    one in the first layer, the third and so on.
    """
    sizes, pattern, layers = model.get("window_size"), model.get("interleaved_attn_pattern"), range(model["num_layers"])
    if pattern is not None:
        return sizes, frozenset(layer for layer in layers if (layer + 1) % sum(pattern) == 0)
    if model.get("query_pre_attn_scalar") is not None:
        return model["window_size"][0], frozenset(layers[1::2])
    return (sizes[0] if sizes and sizes[0] > 0 else None), frozenset()
