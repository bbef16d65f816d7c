# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which linear layers stay unquantized although their kind is quantized: `quantization_config.exclude`. Needs no torch.

A pattern is a name of Megatron's or Hugging Face's with wildcards, the number of a transformer layer, or `firstN` or
`lastN` for so many layers. Layers that servers load as one (queries, keys and values; the halves of a gated MLP; the
experts of a layer) are excluded as a whole.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError, did_you_mean
from nemo_ptq.models.hugging_face import HuggingFaceClass
from nemo_ptq.models.mapping import EMBEDDING, OUTPUT
from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import ModelSpec

_OPTION = "quantization_config.exclude"
_ENDS = re.compile(r"(first|last)(\d+)")


def unquantized_layers(quantization: QuantizationConfig, model: ModelSpec) -> frozenset[str]:
    """Returns the linear layers of the transformer layers that the user has left out of the quantization.

    Args:
        quantization: The user's configuration.
        model: The model.

    Returns:
        Megatron's names in the whole model.

    Raises:
        PtqError: If a pattern matches nothing, or only a part of one layer of the servers.
    """
    if quantization.kv_cache_only:
        return frozenset(linear_layers(model))
    if not quantization.exclusions:
        return frozenset()
    return _excluded(quantization.exclusions, model, hugging_face_table(model))


def linear_layers(model: ModelSpec) -> dict[str, int]:
    """Returns the number of the transformer layer of each linear layer in one, by Megatron's name."""
    return {
        f"decoder.layers.{layer}.{module.name}": layer
        for layer, spec in enumerate(model.layers)
        for module in spec.modules
        if module.is_quantized
    }


def _excluded(patterns: Sequence[str], model: ModelSpec, names: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    linears = linear_layers(model)
    called = {linear: hugging_face_names(linear, model, names) for linear in linears}
    # The names of each layer; the names that are matched so far.
    parts = {linear: {linear, *own.values()} for linear, own in called.items()}
    matched: dict[str, set[str]] = defaultdict(set)
    for pattern in patterns:
        if (chosen := _by_number(pattern, model.num_layers)) is not None:
            found = {linear: parts[linear] for linear, layer in linears.items() if layer in chosen}
        else:
            found = {linear: {name for name in known if fnmatchcase(name, pattern)} for linear, known in parts.items()}
            found = {linear: some for linear, some in found.items() if some}
        if not found and not any(fnmatchcase(name, pattern) for name in never_quantized(model, names)):
            raise PtqError(f"{_OPTION}={pattern} matches no layer{_nearest(pattern, parts, model)}")
        for linear, some in found.items():
            matched[linear] |= some
    for linear, some in matched.items():
        own = called[linear]
        if linear not in some and (left := [name for name in own.values() if name not in some]):
            raise PtqError(
                f"{_OPTION} matches {sorted(some)[0]} without {' and '.join(left)}, which servers load as one layer: "
                "exclude them together, or neither"
            )
    _check_experts(frozenset(matched), model)
    if len(matched) == len(linears):
        raise PtqError(f"{_OPTION} leaves no layer to be quantized: use quantization_config.algorithm=no_quant")
    return frozenset(matched)


def _by_number(pattern: str, num_layers: int) -> range | None:
    """The transformer layers that a pattern names by their numbers; None where it does not."""
    if pattern.isdecimal():
        return range(int(pattern), int(pattern) + 1)
    if match := _ENDS.fullmatch(pattern):
        count = min(int(match[2]), num_layers)
        return range(count) if match[1] == "first" else range(num_layers - count, num_layers)
    return None


def _check_experts(excluded: frozenset[str], model: ModelSpec) -> None:
    for layer, spec in enumerate(model.layers):
        experts = [f"decoder.layers.{layer}.{module.name}" for module in spec.modules if module.expert is not None]
        left = [name for name in experts if name not in excluded]
        if len(left) not in (0, len(experts)):
            raise PtqError(
                f"{_OPTION} matches some of the experts of layer {layer} and not {left[0]}: servers load them as one, "
                "so exclude all of them, with their first and second layers, or none"
            )


def hugging_face_table(model: ModelSpec) -> Mapping[str, Mapping[str, str]]:
    """Returns Hugging Face's names of the modules of the model's family; none where it has no class there."""
    found: HuggingFaceClass | None = None
    with suppress(PtqError):  # a rule says so
        found = family_of(model.config_class.rpartition(".")[2]).hugging_face
    return {} if found is None else found.module_names()


def hugging_face_names(linear: str, model: ModelSpec, names: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Returns Hugging Face's name of each group of rows of a linear layer; `names` are those of the family."""
    layer, expert = linear.split(".")[2], model.module(linear).expert
    template = linear.replace(f".{layer}.", ".{layer}.", 1)
    if expert is not None:
        template = template.replace(f".{expert}.", ".{expert}.", 1)
    return {rows: name.format(layer=layer, expert=expert) for rows, name in names.get(template, {}).items()}


def never_quantized(model: ModelSpec, names: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Returns modules that no algorithm quantizes, but a user may name all the same: vocabularies and routers."""
    modules = [
        *(EMBEDDING, OUTPUT, "embedding.position_embeddings"),
        *(f"decoder.layers.{{layer}}.{module.name}" for module in model.layers[0].modules if module.kind == "router"),
    ]
    templates = [*modules, *(name for module in modules for name in names.get(module, {}).values())]
    return [template.format(layer=layer) for template in templates for layer in range(model.num_layers)]


def _nearest(pattern: str, parts: Mapping[str, set[str]], model: ModelSpec) -> str:
    if _by_number(pattern, model.num_layers) is not None:
        return f": the model has layers 0 to {model.num_layers - 1}"
    last = {name.rpartition(".")[2] for known in parts.values() for name in known}
    hint = did_you_mean(pattern.strip("*").rpartition(".")[2], {name.lower(): f"*{name}" for name in sorted(last)})
    return hint or f": it has layers called {', '.join(f'*{name}' for name in sorted(last))}, numbers, firstN and lastN"
