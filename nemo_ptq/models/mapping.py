# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rules between the names of Megatron's tensors, Hugging Face's and TensorRT-LLM's, usable in both directions.

Imports nothing heavy: the command line reads the families, which are made of these rules.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nemo_ptq.models.layers import ModuleSpec

EMBEDDING = "embedding.word_embeddings"
OUTPUT = "output_layer"
QKV = ("q", "k", "v")
GATED = ("gate", "up")

POST_NORMS = {
    "post_self_attention_layernorm.": "self_attention.linear_proj.post_layernorm.",
    "post_mlp_layernorm.": "mlp.linear_fc2.post_layernorm.",
}
"""Megatron's names, in a layer and in a checkpoint, of the norms of the outputs of attention and MLP."""
_STATE_SPACE_LINEARS = (".mixer.in_proj", ".mixer.out_proj")


def is_linear(name: str) -> bool:
    """Whether a module is a linear layer of a transformer layer, which algorithms quantize, by Megatron's name."""
    return ".linear_" in name or name.endswith(_STATE_SPACE_LINEARS)


def shares_inputs(linear: str) -> bool:
    """Whether tensor-parallel ranks share the input channels of a linear layer, by Megatron's name of it."""
    return linear.endswith(("linear_proj", "linear_fc2", "mixer.out_proj"))


# Checkpoints keep a norm with the linear layer that follows it, or that it follows.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "mixer.in_proj.layer_norm_": "norm.",
    "decoder.final_norm.": "decoder.final_layernorm.",
    **{stored: live for live, stored in POST_NORMS.items()},
}


def live_name(key: str, layer: object = "", expert: object = "") -> str:
    """Returns Megatron's name of a parameter in a model, from its name in a checkpoint.

    Args:
        key: Without the "module." prefix.
        layer: Its layer's number, or a placeholder for it.
        expert: Its expert's number, or a placeholder for it.

    Example:
        >>> live_name("decoder.layers.mlp.experts.experts.linear_fc1.weight", 3, 5)
        'decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight'
    """
    for stored, live in _NORMS.items():
        key = key.replace(stored, live)
    key = re.sub(r"^decoder\.layers\.(?=\D)", f"decoder.layers.{layer}.", key)
    key = re.sub(r"\.experts\.experts\.(?=\d)", ".experts.local_experts.", key)  # a name for each expert already
    return key.replace(".experts.experts.", f".experts.local_experts.{expert}.")


@dataclass(frozen=True)
class WeightRule:
    """The Hugging Face tensors that make up one Megatron tensor.

    Attributes:
        target: Megatron's name in a checkpoint, without layer and expert numbers.
        sources: Hugging Face's name of each group of its rows, with "{layer}" and "{expert}" for the numbers: under
            the keys of :data:`QKV` or :data:`GATED` where several tensors are fused, else one under "". Groups with
            one name stand one after the other in that tensor.
    """

    target: str
    sources: Mapping[str, str]

    @property
    def module(self) -> str:
        """Megatron's name of the module in a model, with "{layer}" and "{expert}" for the numbers."""
        return live_name(self.target, "{layer}", "{expert}").rpartition(".")[0]

    @property
    def field(self) -> str:
        """The parameter's name in the module."""
        return live_name(self.target).rpartition(".")[2]

    @property
    def is_vocabulary(self) -> bool:
        """Whether it has a row for each token, so that NeMo may pad it."""
        return self.target.startswith((EMBEDDING, OUTPUT))

    @property
    def is_fused(self) -> bool:
        """Whether several groups of rows are one tensor of Hugging Face's."""
        return len(set(self.sources.values())) < len(self.sources)

    def join(
        self, tensors: Iterable["torch.Tensor"], query_groups: int, head_size: int, padded_vocab: int
    ) -> "torch.Tensor":
        """Makes Megatron's tensor.

        Args:
            tensors: Hugging Face's, each once, in the order of :attr:`sources`; weights (rows, ...) or biases (rows).
            query_groups: Key/value heads of the model.
            head_size: Rows of each of them.
            padded_vocab: Rows of the embedding and of the output layer in NeMo.

        Returns:
            (rows of all tensors together, ...), with rows of zeros up to `padded_vocab` where it has a row for each
            token.
        """
        import torch

        groups = tuple(self.sources)
        if groups == QKV:
            if self.is_fused:
                (fused,) = tensors
                keys = query_groups * head_size
                tensors = fused.split([len(fused) - 2 * keys, keys, keys])
            return interleave_qkv(query_groups, *tensors)
        if groups == GATED:
            return torch.cat(list(tensors))
        (tensor,) = tensors
        missing = padded_vocab - len(tensor) if self.is_vocabulary else 0
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor

    def joined_shape(self, shapes: Sequence[tuple[int, ...]], padded_vocab: int) -> tuple[int, ...]:
        """Returns the shape of the tensor that :meth:`join` makes from tensors of these shapes."""
        rows = sum(shape[0] for shape in shapes)
        return (max(rows, padded_vocab) if self.is_vocabulary else rows, *shapes[0][1:])


def interleave_qkv(query_groups: int, q: "torch.Tensor", k: "torch.Tensor", v: "torch.Tensor") -> "torch.Tensor":
    """Orders rows as Megatron does: for each query group its query heads, its key head, its value head.

    Args:
        query_groups: Number of key/value heads.
        q: (heads * head_dim, ...), weight or bias.
        k: (query_groups * head_dim, ...).
        v: (query_groups * head_dim, ...).

    Returns:
        ((heads + 2 * query_groups) * head_dim, ...).
    """
    import torch

    by_group = [tensor.reshape(query_groups, -1, *tensor.shape[1:]) for tensor in (q, k, v)]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def with_bias(target: str, source: str | Mapping[str, str]) -> tuple[WeightRule, WeightRule]:
    """Returns the rules for the weight and the bias of a module.

    Args:
        target: Megatron's name, up to "weight" or "bias".
        source: Hugging Face's name of the module, or of the module of each group of rows.
    """
    names = {"": source} if isinstance(source, str) else source
    weight, bias = (
        WeightRule(target + field, {rows: f"{name}.{field}" for rows, name in names.items()})
        for field in ("weight", "bias")
    )
    return weight, bias


def without_bias(target: str, source: str | Mapping[str, str]) -> tuple[WeightRule]:
    """Returns the rule for the weight of a module without a bias, as a tuple; arguments as for :func:`with_bias`."""
    return (with_bias(target, source)[0],)


# TensorRT-LLM's tensors of each module of a layer: their name, and the groups of rows that they hold, in their order.
# The activated half of an MLP is fc, whatever the model's own names say. Those of experts are stacked, and its second
# half comes first there.
TRTLLM: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "input_layernorm": {"input_layernorm": ("",)},
    "pre_mlp_layernorm": {"post_layernorm": ("",)},
    "self_attention.linear_qkv": {"attention.qkv": QKV},
    "self_attention.q_layernorm": {"attention.q_layernorm": ("",)},
    "self_attention.k_layernorm": {"attention.k_layernorm": ("",)},
    "self_attention.linear_proj": {"attention.dense": ("",)},
    "mlp.linear_fc1": {"mlp.fc": ("gate",), "mlp.gate": ("up",)},
    "mlp.linear_fc2": {"mlp.proj": ("",)},
    "mlp.router": {"mlp.router": ("",)},
    "mlp.experts.local_experts.linear_fc1": {"mlp.fc": ("up", "gate")},
    "mlp.experts.local_experts.linear_fc2": {"mlp.proj": ("",)},
}


# The same where the outputs of attention and MLP are normalised as well.
_TRTLLM_SANDWICH: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "post_self_attention_layernorm": {"post_layernorm": ("",)},
    "pre_mlp_layernorm": {"pre_feedforward_layernorm": ("",)},
    "post_mlp_layernorm": {"post_feedforward_layernorm": ("",)},
}


def trtllm_tensors(module: "ModuleSpec", has_post_norms: bool = False) -> Mapping[str, tuple[str, ...]]:
    """Returns TensorRT-LLM's tensors of a module of a layer.

    Args:
        module: The module.
        has_post_norms: Whether its layer normalises the outputs of attention and MLP.

    Returns:
        The groups of rows in each, by name within the layer; an MLP without a gate is fc alone.
    """
    name = module.name if module.expert is None else module.name.replace(f".{module.expert}.", ".", 1)
    tensors = {**TRTLLM, **_TRTLLM_SANDWICH}[name] if has_post_norms else TRTLLM[name]
    return {next(iter(tensors)): ("",)} if tuple(module.rows) == ("",) else tensors


# The names that Hugging Face's newer classes share.
LAYER = "model.layers.{layer}."
SPLIT_QKV = {rows: f"{LAYER}self_attn.{rows}_proj" for rows in QKV}
EMBEDDING_RULE = WeightRule(f"{EMBEDDING}.weight", {"": "model.embed_tokens.weight"})
ATTENTION = (
    *without_bias("decoder.layers.self_attention.linear_qkv.", SPLIT_QKV),
    *without_bias("decoder.layers.self_attention.linear_proj.", LAYER + "self_attn.o_proj"),
)
# Gemma 2 and 3 have four norms in a layer.
SANDWICH_NORMS = (
    *without_bias("decoder.layers.self_attention.linear_qkv.layer_norm_", LAYER + "input_layernorm"),
    *without_bias("decoder.layers.self_attention.linear_proj.post_layernorm.", LAYER + "post_attention_layernorm"),
    *without_bias("decoder.layers.mlp.linear_fc1.layer_norm_", LAYER + "pre_feedforward_layernorm"),
    *without_bias("decoder.layers.mlp.linear_fc2.post_layernorm.", LAYER + "post_feedforward_layernorm"),
    *without_bias("decoder.final_layernorm.", "model.norm"),
)
QK_NORMS = tuple(
    rule
    for rows in ("q", "k")
    for rule in without_bias(f"decoder.layers.self_attention.{rows}_layernorm.", f"{LAYER}self_attn.{rows}_norm")
)
GATED_MLP = (
    *without_bias("decoder.layers.mlp.linear_fc1.", {rows: f"{LAYER}mlp.{rows}_proj" for rows in GATED}),
    *without_bias("decoder.layers.mlp.linear_fc2.", LAYER + "mlp.down_proj"),
)
_NORM_MODULES = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_": LAYER + "input_layernorm",
    "decoder.layers.mlp.linear_fc1.layer_norm_": LAYER + "post_attention_layernorm",
    "decoder.final_layernorm.": "model.norm",
}
RMS_NORMS = tuple(rule for module in _NORM_MODULES.items() for rule in without_bias(*module))
LAYER_NORMS = tuple(rule for module in _NORM_MODULES.items() for rule in with_bias(*module))
