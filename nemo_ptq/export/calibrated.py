# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Weights and a calibration state, as exports see a calibrated model's layers.

The weights may be a Megatron model's on this rank, or a checkpoint's files. They are never changed: a layer is smoothed
and its weight amax computed when it is packed, as ModelOpt does in a model that a state is applied to, bit for bit.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace

import torch

from nemo_ptq.checkpoint.parts import shares_inputs
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.module_tensors import Linear, Plain
from nemo_ptq.parallel.ranks import ALONE, Ranks
from nemo_ptq.quantization.algorithms import algorithm_of, quantization_of_layer
from nemo_ptq.quantization.pieces import by_rows
from nemo_ptq.quantization.rounded_weight import RoundedWeight
from nemo_ptq.quantization.schemes import Scheme, scheme_for


def algorithm_scheme(quantization: QuantizationConfig) -> Scheme:
    """Returns the scheme of the layers that one of our algorithms quantizes."""
    algorithm = algorithm_of(quantization)
    return scheme_for(algorithm.scheme, algorithm.block_size_of(quantization))


def layer_schemes(
    quantization: QuantizationConfig, choice: Mapping[str, str], linears: Iterable[str]
) -> dict[str, Scheme]:
    """Returns the scheme of each quantized layer.

    Args:
        quantization: The user's settings.
        choice: Name of the algorithm of each layer, where one was chosen for each; otherwise empty.
        linears: The layers.
    """
    own = {name: quantization_of_layer(quantization, choice[name]) if choice else quantization for name in linears}
    schemes = {name: algorithm_scheme(its) for name, its in own.items()}
    return {name: scheme for name, scheme in schemes.items() if scheme.quant_algo is not None}


def smoothed(weight: torch.Tensor, pre_quant_scale: torch.Tensor) -> torch.Tensor:
    """Divides a weight by the scale that its input is multiplied by.

    Args:
        weight: (out, in).
        pre_quant_scale: float32 (in).
    """
    factors = (1.0 / pre_quant_scale)[None, :]
    return by_rows(lambda rows: rows * factors, weight, weight.dtype)


def weight_amax(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Returns the largest magnitudes of a weight (out, in), as :class:`Linear` has them for a scheme."""
    magnitudes = weight.abs()
    if scheme.amaxes == "rows":
        return magnitudes.amax(1)
    if scheme.amaxes == "blocks":
        return magnitudes.unflatten(1, (-1, scheme.block_size)).amax(-1)
    return magnitudes.amax()


# A weight's amax, as its scheme has it, and the second one of a scheme that rounds twice.
WeightAmaxes = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class CalibratedLayers:
    """Layers quantized as a state says, by Megatron's names in the whole model.

    Attributes:
        read: Returns this rank's shard of a parameter, by Megatron's name in the whole model; None where there is none.
        state: Entries of the calibration state, of whole layers; more may come while blocks are calibrated.
        schemes: How each quantized layer is stored.
        zero_centered_norms: Whether gains of norms are stored minus one.
        is_smoothed: Whether the weights are already divided by their pre-quantization scales.
        tensor: The ranks that share dense layers.
        expert_tensor: The ranks that share an expert.
        weight_amaxes: Weight amaxes that do not follow from this rank's weight alone.
        rounded: Returns what this rank's shard of a weight was rounded to, by the layer's name; None where that follows
            from the weight.
    """

    read: Callable[[str], torch.Tensor | None]
    state: MutableMapping[str, torch.Tensor]
    schemes: Mapping[str, Scheme]
    zero_centered_norms: bool
    is_smoothed: bool = False
    tensor: Ranks = ALONE
    expert_tensor: Ranks = ALONE
    weight_amaxes: dict[str, WeightAmaxes] = field(default_factory=dict)
    rounded: Callable[[str], RoundedWeight | None] = lambda name: None

    def agree_on_weights(self, linears: Iterable[str]) -> None:
        """Computes the weight amaxes that ranks share; every rank that shares the layers calls it, in one order."""
        for name in linears:
            follows = self.is_quantized(name) and name not in self.weight_amaxes and self.rounded(name) is None
            if follows and self._ranks(name).size > 1:
                self.weight_amaxes[name] = self._amaxes(name, self._smoothed_weight(name), self._ranks(name))

    def linear(self, name: str) -> Linear:
        """Returns a linear layer."""
        bias = self.read(f"{name}.bias")
        if not self.is_quantized(name):
            return Linear(self._weight(name), bias)
        weight, rounded = self._smoothed_weight(name), self.rounded(name)
        linear = Linear(
            weight,
            bias,
            self.schemes[name],
            input_amax=self._local(name, "amax", weight),
            pre_quant_scale=self.pre_quant_scale(name),
        )
        if rounded is not None:
            return replace(linear, rounded=rounded.map(lambda tensor: tensor.to(weight.device)))
        amax, second = self.weight_amaxes.get(name) or self._amaxes(name, weight)
        return replace(linear, weight_amax=amax, weight_amax_2=second)

    def _amaxes(self, name: str, weight: torch.Tensor, ranks: Ranks = ALONE) -> WeightAmaxes:
        """The weight's amaxes, over the ranks where they share the elements of one."""
        scheme = self.schemes[name]
        amax = weight_amax(weight, scheme)
        if amax.dim() == 0 or (amax.dim() == 1 and shares_inputs(name)):
            ranks.max(amax)
        return amax, ranks.max(weight.abs().amax()) if scheme.quant_algo == "W4A8_AWQ" else None

    def plain(self, name: str) -> Plain:
        """Returns a norm, an embedding or a router."""
        offset = 1.0 if self.zero_centered_norms and name.endswith("layernorm") else 0.0
        return Plain(self._weight(name), self.read(f"{name}.bias"), offset)

    def kv_cache(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the largest magnitudes of the keys and the values that an attention caches, one element each."""
        key, value = (self.state[f"{name}.{kind}_bmm_quantizer.amax"] for kind in "kv")
        return key, value

    def pre_quant_scale(self, name: str) -> torch.Tensor | None:
        """Returns the pre-quantization scale of a linear layer's input: (local in), or None."""
        weight = self.read(f"{name}.weight")
        scale = None if weight is None else self._local(name, "pre_quant_scale", weight)
        return None if scale is None or weight is None else scale.to(weight.dtype)

    def is_quantized(self, name: str) -> bool:
        """Whether a linear layer is quantized."""
        return name in self.schemes

    def _ranks(self, name: str) -> Ranks:
        return self.expert_tensor if ".local_experts." in name else self.tensor

    def _weight(self, name: str) -> torch.Tensor:
        weight = self.read(f"{name}.weight")
        assert weight is not None, name
        return weight

    def _smoothed_weight(self, name: str) -> torch.Tensor:
        weight = self._weight(name)
        scale = self._local(name, "pre_quant_scale", weight)
        return weight if scale is None or self.is_smoothed else smoothed(weight, scale)

    def _local(self, name: str, what: str, weight: torch.Tensor) -> torch.Tensor | None:
        """This rank's share of an entry of the state, where the weight is."""
        value = self.state.get(f"{name}.input_quantizer.{what}")
        if value is None:
            return None
        if value.numel() > 1 and shares_inputs(name):
            value = self._ranks(name).shard(value)
        return value.to(weight.device)
