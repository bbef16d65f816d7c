# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The modules of a transformer layer, under Megatron's names. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nemo_ptq.models.spec import ModelSpec


@dataclass(frozen=True)
class ModuleSpec:
    """A module with weights.

    Attributes:
        name: Megatron's name within the layer, such as "self_attention.linear_qkv".
        kind: Its function. Algorithms quantize linear layers.
        rows: Sizes of the groups of its weight's rows, over all ranks and in Megatron's order, under the keys of
            :data:`~nemo_ptq.models.mapping.QKV` or :data:`~nemo_ptq.models.mapping.GATED`, or one under "". Rows of
            queries, keys and values are interleaved by query group.
        inputs: In-features over all ranks; 0 for a norm.
        axis: Which axis of the weight tensor-parallel ranks share: 0 (its rows), 1 (its input channels) or None.
        has_bias: Whether there is a bias, of as many elements as the weight has rows.
        norm: Name of the norm whose output enters it; None for a linear layer that follows no norm.
        expert: The expert that it belongs to; None for a module that all tokens go through.
        kernel: Positions that a depthwise convolution covers; 0 for other modules.
        parameters: Names of its weights, which are all of one shape.
    """

    name: str
    kind: Literal["linear", "norm", "router", "conv", "state"]
    rows: Mapping[str, int]
    inputs: int = 0
    axis: int | None = None
    has_bias: bool = False
    norm: str | None = None
    expert: int | None = None
    kernel: int = 0
    parameters: tuple[str, ...] = ("weight",)

    @property
    def is_quantized(self) -> bool:
        """Whether algorithms quantize it."""
        return self.kind == "linear"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight: (out, in), of a norm (size), of a convolution (channels, 1, kernel)."""
        return self.shape_of("")

    def shape_of(self, rows: str) -> tuple[int, ...]:
        """Shape of a group of rows of the weight; of all rows where there is no such group."""
        kernel = (self.kernel,) if self.kernel else ()
        return (self.outputs(rows), self.inputs, *kernel) if self.inputs else (self.outputs(rows),)

    def outputs(self, rows: str = "") -> int:
        """Out-features of a group of rows; of all rows where there is no such group."""
        return self.rows.get(rows, sum(self.rows.values()))


@dataclass(frozen=True)
class LayerSpec:
    """A transformer layer.

    Attributes:
        modules: Those with weights, in the order in which they are computed.
    """

    modules: Sequence[ModuleSpec]

    @cached_property
    def _by_name(self) -> Mapping[str, ModuleSpec]:
        return {module.name: module for module in self.modules}

    def __getitem__(self, name: str) -> ModuleSpec:
        """The module with a name within the layer."""
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is a module with a name within the layer."""
        return name in self._by_name

    def after(self, norm: str) -> ModuleSpec | None:
        """The linear layer that a norm's output enters; None where it enters none, or several."""
        linears = [module for module in self.modules if module.norm == norm and module.kind == "linear"]
        return linears[0] if len(linears) == 1 else None


def attention_modules(model: "ModelSpec") -> tuple[ModuleSpec, ...]:
    """Returns the modules of Megatron's attention, the norm before it included."""
    hidden, head = model.hidden_size, model.head_size
    heads, groups = model.num_attention_heads * head, model.num_query_groups * head
    has_norm_bias, before = model.normalization == "LayerNorm", "input_layernorm"
    return (
        ModuleSpec(before, "norm", {"": hidden}, has_bias=has_norm_bias),
        ModuleSpec(
            "self_attention.linear_qkv",
            "linear",
            {"q": heads, "k": groups, "v": groups},
            hidden,
            0,
            model.qkv_bias,
            norm=before,
        ),
        *(
            ModuleSpec(f"self_attention.{name}_layernorm", "norm", {"": head}, has_bias=has_norm_bias)
            for name in ("q", "k")
            if model.qk_norm
        ),
        ModuleSpec("self_attention.linear_proj", "linear", {"": hidden}, heads, 1, model.linear_bias),
        *_post_norm(model, "self_attention"),
    )


def mlp_modules(model: "ModelSpec") -> tuple[ModuleSpec, ...]:
    """Returns the modules of Megatron's MLP, or of its mixture of experts, the norm before it included."""
    hidden, inner, before = model.hidden_size, model.ffn_hidden_size, "pre_mlp_layernorm"
    fc1_rows = {"gate": inner, "up": inner} if model.gated_mlp else {"": inner}
    norm = ModuleSpec(before, "norm", {"": hidden}, has_bias=model.normalization == "LayerNorm")
    if not model.num_experts:
        return (
            norm,
            ModuleSpec("mlp.linear_fc1", "linear", fc1_rows, hidden, 0, model.linear_bias, norm=before),
            ModuleSpec("mlp.linear_fc2", "linear", {"": hidden}, inner, 1, model.linear_bias),
            *_post_norm(model, "mlp"),
        )
    modules = [norm, ModuleSpec("mlp.router", "router", {"": model.num_experts}, hidden, norm=before)]
    for expert in range(model.num_experts):
        name = f"mlp.experts.local_experts.{expert}."
        # Experts have no biases in any family that is supported.
        modules += [
            ModuleSpec(name + "linear_fc1", "linear", fc1_rows, hidden, 0, norm=before, expert=expert),
            ModuleSpec(name + "linear_fc2", "linear", {"": hidden}, inner, 1, expert=expert),
        ]
    return tuple(modules)


def _post_norm(model: "ModelSpec", sublayer: str) -> tuple[ModuleSpec, ...]:
    """The norm of a sublayer's output, where there is one."""
    if not model.gemma:
        return ()
    has_bias = model.normalization == "LayerNorm"
    return (ModuleSpec(f"post_{sublayer}_layernorm", "norm", {"": model.hidden_size}, has_bias=has_bias),)


def gpt_layer(model: "ModelSpec") -> LayerSpec:
    """Returns Megatron's GPT layer: attention and an MLP, or a mixture of experts, each after a norm."""
    return LayerSpec((*attention_modules(model), *mlp_modules(model)))
