# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which tensors a calibration state holds, by its algorithm and its model. Needs no torch."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nemo_ptq.errors import ConfigError
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.algorithms import ALGORITHMS, SELECTABLE, algorithm_named, kv_cache_is_quantized
from nemo_ptq.quantization.excluded import unquantized_layers
from nemo_ptq.quantization.state_header import StateHeader

Shape = tuple[int, ...]

_ATTENTION = "self_attention.core_attention"
# The data types that each kind of entry may have: an amax has that of the activations.
_DTYPES = {"amax": ("BF16", "F16", "F32"), "pre_quant_scale": ("F32",), "channel_amax": ("F32",)}
_NAME = re.compile(r"(?P<module>.+)\.(?:input|[kv]_bmm)_quantizer\.(?:amax|pre_quant_scale|channel_amax)")


def read_entries(path: Path) -> dict[str, tuple[str, Shape]]:
    """Reads the data type, by safetensors' name, and the shape of each tensor of a calibration state.

    Raises:
        ConfigError: If the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return {name: (str(value.get_dtype()), tuple(value.get_shape())) for name, value in slices.items()}
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError([f"calibration_state={path} cannot be read ({reason}): copy it again"]) from error


def expected_shapes(header: StateHeader, model: ModelSpec) -> dict[str, Shape]:
    """Returns the shape of each tensor that one of our algorithms decides of a model, by the tensor's name."""
    with_cache = kv_cache_is_quantized(header.quantization, header.decoder)
    unquantized = unquantized_layers(header.quantization, model)
    shapes: dict[str, Shape] = {}
    for index, layer in enumerate(model.layers):
        name = f"decoder.layers.{index}."
        for module in layer.modules:
            if module.is_quantized and f"{name}{module.name}" not in unquantized:
                quantizer = f"{name}{module.name}.input_quantizer."
                kinds = _kinds(header, f"{name}{module.name}")
                shapes |= {f"{quantizer}{kind}": (1,) if kind == "amax" else (module.inputs,) for kind in kinds}
        if with_cache and "self_attention.linear_qkv" in layer:
            shapes |= {f"{name}{_ATTENTION}.{which}_bmm_quantizer.amax": (1,) for which in "kv"}
    return shapes


def _kinds(header: StateHeader, linear: str) -> tuple[str, ...]:
    """The decisions for a linear layer that is quantized."""
    algorithm = algorithm_named(header.choice.get(linear, header.quantization.algorithm_name))
    is_rounded = header.quantization.is_balanced and algorithm.rounder_entries is not None
    return algorithm.rounder_entries or () if is_rounded else algorithm.entries


def _choice_problem(header: StateHeader, model: ModelSpec) -> str | None:
    """The problem with the algorithms that were chosen for the layers."""
    if not algorithm_named(header.quantization.algorithm_name).chooses:
        return "it names an algorithm for each layer, and quantizes all alike" if header.choice else None
    unquantized = unquantized_layers(header.quantization, model)
    linears = {
        name
        for index, layer in enumerate(model.layers)
        for module in layer.modules
        if module.is_quantized and (name := f"decoder.layers.{index}.{module.name}") not in unquantized
    }
    if header.choice.keys() != linears:
        odd = sorted(header.choice.keys() ^ linears)[0]
        return f"it names {'an' if odd in header.choice else 'no'} algorithm for {odd}"
    unknown = set(header.choice.values()) - ALGORITHMS.keys()
    return f"it names the algorithm {min(unknown)}, which is not known" if unknown else None


def entry_problems(entries: Mapping[str, tuple[str, Shape]], header: StateHeader, model: ModelSpec) -> Iterator[str]:
    """Yields the problems of a calibration state's tensors, a few words for each; their values are not read.

    For a user's own ModelOpt configuration it is only known what the tensors may be called, not which ones there should
    be.
    """
    if problem := _choice_problem(header, model):
        yield problem
        return
    if header.quantization.algorithm_name in SELECTABLE:
        expected = expected_shapes(header, model)
        yield from (f"{name} is missing" for name in expected if name not in entries)
    else:
        modules = {"output_layer"} | {
            f"decoder.layers.{index}.{name}"
            for index, layer in enumerate(model.layers)
            for name in (_ATTENTION, *(module.name for module in layer.modules))
        }
        known = {name for name in entries if (match := _NAME.fullmatch(name)) and match["module"] in modules}
        expected = {name: entries[name][1] for name in known}
    for name, (dtype, shape) in entries.items():
        if name not in expected:
            yield f"{name} belongs to no layer of the model"
        elif shape != expected[name]:
            yield f"{name} has shape {list(shape)}, not {list(expected[name])}"
        elif dtype not in (allowed := _DTYPES[name.rpartition(".")[2]]):
            yield f"{name} is {dtype}, not {' or '.join(allowed)}"
