# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's files and a calibration state, as exports see a calibrated model: layer by layer, without a model.

Weights are smoothed and ranged as ModelOpt does in a model that a state is applied to, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.export.layers import Linear, Plain
from nemo_ptq.export.shard_map import ShardMap, on_one_rank
from nemo_ptq.quantization.schemes import Scheme, scheme_for
from nemo_ptq.quantization.state import CalibrationState, fingerprint_of, is_fingerprinted, sum_of_bits

_NVFP4_BLOCK = 16
# The data type in which a checkpoint is loaded to be calibrated.
_LOADED = torch.bfloat16


def scheme_of(quantization: QuantizationConfig) -> Scheme:
    """Returns the scheme of the layers that one of our algorithms quantizes."""
    algorithm = quantization.algorithm_name
    blocks = {"int4_awq": quantization.awq_block_size, "w4a8_awq": quantization.awq_block_size, "nvfp4": _NVFP4_BLOCK}
    return scheme_for(algorithm, blocks.get(algorithm, 0))


def smoothed(weight: torch.Tensor, pre_quant_scale: torch.Tensor) -> torch.Tensor:
    """Divides a weight by the scale that its input is multiplied with.

    Args:
        weight: (out, in).
        pre_quant_scale: float32 (in).
    """
    return (weight * (1.0 / pre_quant_scale)[None, :]).to(weight.dtype)


def weight_ranges(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Returns the largest magnitudes of a weight (out, in), as :class:`Linear` has them for a scheme."""
    magnitudes = weight.abs()
    if scheme.quant_algo == "W8A8_SQ_PER_CHANNEL":
        return magnitudes.amax(1)
    if scheme.quant_algo in ("W4A16_AWQ", "W4A8_AWQ"):
        return magnitudes.unflatten(1, (-1, scheme.block_size)).amax(-1)
    return magnitudes.amax()


@dataclass(frozen=True)
class StoredLayers:
    """The layers of a checkpoint, quantized as a state says: see :class:`~nemo_ptq.export.layers.Layers`.

    Attributes:
        parts: Every part of every tensor of the checkpoint, by Megatron's name of the parameter.
        state: The calibration, made by one of our algorithms.
        zero_centered_norms: Whether gains of norms are stored minus one.
    """

    parts: Mapping[str, TensorPart]
    state: CalibrationState
    zero_centered_norms: bool

    @cached_property
    def _scheme(self) -> Scheme:
        return scheme_of(self.state.header.quantization)

    def fingerprint(self) -> str:
        """Returns the fingerprint of the weights, see :func:`~nemo_ptq.quantization.state.fingerprint_of`."""
        weights = {name.removesuffix(".weight"): name for name in self.parts if name.endswith(".weight")}
        fingerprinted = {module: name for module, name in weights.items() if is_fingerprinted(module)}
        return fingerprint_of({module: sum_of_bits(self._read(name)) for module, name in fingerprinted.items()})

    @property
    def shard_map(self) -> ShardMap:
        """Rank 0 has everything."""
        modules = {name.rpartition(".")[0] for name in self.parts}
        caches = {name.partition(".k_bmm_quantizer")[0] for name in self.state.tensors if ".k_bmm_quantizer" in name}
        schemes = {name: self._scheme for name in sorted(modules) if self._is_quantized(name)}
        return on_one_rank(modules | caches, schemes, frozenset(caches))

    def linear(self, name: str) -> Linear:
        """See :meth:`Layers.linear`."""
        weight, bias = self._read(f"{name}.weight"), self._read_optional(f"{name}.bias")
        if not self._is_quantized(name):
            return Linear(weight, bias)
        scale = self._learned(name, "pre_quant_scale")
        if scale is not None:
            weight = smoothed(weight, scale)
        return Linear(
            weight,
            bias,
            self._scheme,
            weight_ranges(weight, self._scheme),
            weight.abs().amax() if self._scheme.quant_algo == "W4A8_AWQ" else None,
            self._learned(name, "amax"),
            None if scale is None else scale.to(weight.dtype),
        )

    def plain(self, name: str) -> Plain:
        """See :meth:`Layers.plain`."""
        offset = 1.0 if self.zero_centered_norms and name.endswith("layernorm") else 0.0
        return Plain(self._read(f"{name}.weight"), self._read_optional(f"{name}.bias"), offset)

    def kv_cache(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """See :meth:`Layers.kv_cache`."""
        key, value = (self.state.tensors[f"{name}.{kind}_bmm_quantizer.amax"] for kind in "kv")
        return key, value

    def pre_quant_scale(self, name: str) -> torch.Tensor | None:
        """See :meth:`Layers.pre_quant_scale`."""
        scale = self._learned(name, "pre_quant_scale")
        return None if scale is None else scale.to(_LOADED)

    def _learned(self, name: str, what: str) -> torch.Tensor | None:
        return self.state.tensors.get(f"{name}.input_quantizer.{what}")

    def _is_quantized(self, name: str) -> bool:
        return any(self._learned(name, what) is not None for what in ("amax", "pre_quant_scale"))

    def _read(self, name: str) -> torch.Tensor:
        return self.parts[name].read().to(_LOADED)

    def _read_optional(self, name: str) -> torch.Tensor | None:
        return self._read(name) if name in self.parts else None
