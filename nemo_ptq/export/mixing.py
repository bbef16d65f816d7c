# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What algorithm "auto" can choose: which layers are quantized alike, and how each may be. Needs no torch.

Servers load queries, keys and values as one layer, and the halves of a gated MLP: so does Megatron. They have one way
for all experts of a layer, too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.layers import ModuleSpec
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.algorithms import ALGORITHMS, algorithm_named, algorithm_of, quantization_of_layer


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers of one transformer layer that are quantized alike: one of them, or all experts'.

    Attributes:
        linears: Megatron's names of the layers, in the whole model.
        weights: Number of their weights.
        options: Names of the algorithms to choose from; the last is "no_quant".
    """

    linears: tuple[str, ...]
    weights: int
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first layer's."""
        return self.linears[0]


def mixable(formats: Sequence[str]) -> tuple[str, ...]:
    """Returns the algorithms that "auto" can mix in all of some formats."""
    return tuple(name for name in ALGORITHMS if all(name in FORMATS[one].mixes for one in formats))


def options(quantization: QuantizationConfig, formats: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the :func:`mixable` algorithms that the user names, or that "auto" takes by itself."""
    asked = quantization.candidate_names or algorithm_of(quantization).candidates
    return tuple(name for name in mixable(formats) if name in asked)


def layer_groups(
    quantization: QuantizationConfig,
    model: ModelSpec,
    formats: Sequence[str],
    calibration_tp: int = 1,
    unquantized: Collection[str] = (),
) -> list[LayerGroup]:
    """Returns what "auto" chooses for, in the model's order.

    Args:
        quantization: The user's settings.
        model: The model.
        formats: The export formats.
        calibration_tp: Tensor parallelism of the calibration, which cuts the blocks that share a scale.
        unquantized: Linear layers that are left out of the quantization.
    """
    names = options(quantization, formats)
    found = []
    for layer, spec in enumerate(model.layers):
        linears = {
            name: module
            for module in spec.modules
            if module.is_quantized and (name := f"decoder.layers.{layer}.{module.name}") not in unquantized
        }
        for group in _quantized_alike(linears):
            modules = list(group.values())
            fitting = [name for name in names if _fits(name, modules, quantization, calibration_tp, model)]
            if modules[0].expert is not None:
                fitting = [name for name in fitting if all(name in FORMATS[one].experts for one in formats)]
            weights = sum(prod(module.shape) for module in modules)
            found.append(LayerGroup(tuple(group), weights, (*fitting, NO_QUANT)))
    return found


def bits_of(option: str, quantization: QuantizationConfig) -> float:
    """Returns the bits of a weight on average that an option takes, scales counted."""
    return algorithm_named(option).bits_per_weight(quantization_of_layer(quantization, option))


def least_bits(groups: Sequence[LayerGroup], quantization: QuantizationConfig) -> float:
    """Returns the fewest bits of a weight on average that a choice can come to."""
    least = sum(group.weights * min(bits_of(option, quantization) for option in group.options) for group in groups)
    return least / sum(group.weights for group in groups)


def _quantized_alike(linears: Mapping[str, ModuleSpec]) -> Iterator[Mapping[str, ModuleSpec]]:
    experts = {name: module for name, module in linears.items() if module.expert is not None}
    yield from ({name: module} for name, module in linears.items() if module.expert is None)
    if experts:
        yield experts


def _fits(
    name: str, modules: Sequence[ModuleSpec], quantization: QuantizationConfig, calibration_tp: int, model: ModelSpec
) -> bool:
    """Whether layers are whole blocks on each rank, and of sizes that kernels take: see the rule nvfp4_blocks_fit."""
    algorithm = algorithm_named(name)
    block_size = algorithm.block_size_of(quantization)
    if not block_size:
        return True
    rows, columns = algorithm.row_multiple, algorithm.column_multiple
    if model.num_experts is None:
        rows = columns = algorithm.dense_multiple
    return all(
        module.inputs % (block_size * (calibration_tp if module.axis == 1 else 1)) == 0
        and module.outputs() % rows == 0
        and module.inputs % columns == 0
        for module in modules
    )
