# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Which linear layers stay unquantized although their kind is quantized: `quantization_config.exclude`. Needs no torch.

A pattern is a name of Megatron's or Hugging Face's with wildcards, the number of a transformer layer, or `firstN` or
`lastN` for so many layers. What servers load as one layer (queries, keys and values; the halves of a gated MLP; the
experts of a layer) is excluded as a whole.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError, did_you_mean
from nemo_ptq.models.hugging_face import HuggingFaceClass
from nemo_ptq.models.mapping import EMBEDDING, OUTPUT
from nemo_ptq.models.registry import family_of, hugging_face_classes
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.presets import preset_patterns

_OPTION = "quantization_config.exclude"
_LAYER_NUMBER = re.compile(r"layers\.(\d+)\b")
_WORD = re.compile(r"[A-Za-z_]\w+")
_CHOICE = re.compile(r"\[[^\]]*\]")
# What ModelOpt's own recipes name besides.
_OTHER_WORDS = (
    *("b_proj", "bmm2_output_quantizer", "encoder", "f_a_proj", "f_b_proj", "fc1_latent_proj", "fc2_latent_proj"),
    *("ffn", "g_proj", "image", "in_proj_qkv", "in_proj_z", "kv_a_proj_with_mqa", "kv_b_proj", "language_model"),
    *("model_encoder", "p_bmm_quantizer", "q_a_proj", "q_b_proj", "radio", "score", "self_conditioning"),
    *("share_expert", "shared_experts", "softmax_quantizer", "to_", "transformer_blocks"),
)
_ENDS = re.compile(r"(first|last)(\d+)")


def unquantized_layers(quantization: QuantizationConfig, model: ModelSpec) -> frozenset[str]:
    """Returns the linear layers of the transformer layers that the user has left out of the quantization.

    Args:
        quantization: What the user asked for.
        model: The model.

    Returns:
        Megatron's names in the whole model.

    Raises:
        PtqError: If a pattern matches nothing, or a part of what is one layer for servers.
    """
    if quantization.kv_cache_only:
        return frozenset(_linears(model))
    if not quantization.exclusions:
        return frozenset()
    return _excluded(quantization.exclusions, model, _hugging_face(model))


def _linears(model: ModelSpec) -> dict[str, int]:
    """The number of the transformer layer of each linear layer in one, by Megatron's name."""
    return {
        f"decoder.layers.{layer}.{module.name}": layer
        for layer, spec in enumerate(model.layers)
        for module in spec.modules
        if module.is_quantized
    }


def _excluded(patterns: Sequence[str], model: ModelSpec, names: Mapping[str, Mapping[str, str]]) -> frozenset[str]:
    linears = _linears(model)
    called = {linear: _hugging_face_names(linear, model, names) for linear in linears}
    # What each layer is known by; those of a layer that are matched so far.
    parts = {linear: {linear, *own.values()} for linear, own in called.items()}
    matched: dict[str, set[str]] = defaultdict(set)
    for pattern in patterns:
        if (chosen := _by_number(pattern, model.num_layers)) is not None:
            found = {linear: parts[linear] for linear, layer in linears.items() if layer in chosen}
        else:
            found = {linear: {name for name in known if fnmatchcase(name, pattern)} for linear, known in parts.items()}
            found = {linear: some for linear, some in found.items() if some}
        if not found and not any(fnmatchcase(name, pattern) for name in _never_quantized(model, names)):
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


def unseen_by_modelopt(patterns: Sequence[str], model: ModelSpec) -> list[str]:
    """Returns the patterns of ModelOpt's quantizers that match linear layers by Hugging Face's names alone.

    ModelOpt sees Megatron's model: in a configuration of the user's own such a pattern does nothing. Left out are those
    whose layers other patterns match by Megatron's names, as in a configuration for both.
    """
    names, unseen = _hugging_face(model), set()
    for linear in _linears(model):
        if any(fnmatchcase(name, pattern) for name in _quantizers(linear) for pattern in patterns):
            continue
        theirs = [name for own in _hugging_face_names(linear, model, names).values() for name in _quantizers(own)]
        unseen |= {pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in theirs)}
    return [pattern for pattern in patterns if pattern in unseen]


def unknown_to_modelopt(patterns: Sequence[str], model: ModelSpec) -> tuple[str, str] | None:
    """Finds a pattern of ModelOpt's quantizers that matches none of a model's, and is not meant for other models.

    Configurations are written for many models: a pattern of words that some model has may match nothing in this one.

    Returns:
        The pattern, and what may have been meant, to follow it; None where there is no such pattern.
    """
    names = _all_quantizers(model)
    own = {part for name in names for part in name.split(".")}
    known = own | _words_of_other_models()
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        if any(int(layer) >= model.num_layers for layer in _LAYER_NUMBER.findall(pattern)):
            return pattern, f": the model has layers 0 to {model.num_layers - 1}"
        for word in _WORD.findall(_CHOICE.sub("*", pattern)):
            if not any(word.lstrip("_") in part for part in known):
                hint = did_you_mean(word, {part.lower(): part for part in sorted(own)})
                return pattern, hint or ": take it out, or name layers as Megatron does, as in *linear_fc2*"
    return None


def _all_quantizers(model: ModelSpec) -> list[str]:
    """Names of ModelOpt's quantizers of a model, under Megatron's and Hugging Face's names of its layers."""
    names = _hugging_face(model)
    linears = [
        own for linear in _linears(model) for own in (linear, *_hugging_face_names(linear, model, names).values())
    ]
    cores = [f"decoder.layers.{layer}.self_attention.core_attention" for layer in range(model.num_layers)]
    found = [name for module in [*linears, *_never_quantized(model, names)] for name in _quantizers(module)]
    return found + [f"{core}.{which}_bmm_quantizer" for core in cores for which in "qkv"]


@cache
def _words_of_other_models() -> frozenset[str]:
    """The parts of the names that other models' modules have, as far as they are known here."""
    tables = [hf_class.module_names() for hf_class in hugging_face_classes().values()]
    names = {name for table in tables for module, own in table.items() for name in (module, *own.values())}
    return frozenset({part for name in {*names, *preset_patterns()} for part in name.split(".")} | set(_OTHER_WORDS))


def _quantizers(linear: str) -> list[str]:
    return [f"{linear}.{which}_quantizer" for which in ("weight", "input", "output")]


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


def _hugging_face(model: ModelSpec) -> Mapping[str, Mapping[str, str]]:
    """Hugging Face's names of the modules of the model's family; none where it has no class there."""
    found: HuggingFaceClass | None = None
    with suppress(PtqError):  # a rule says so
        found = family_of(model.config_class.rpartition(".")[2]).hugging_face
    return {} if found is None else found.module_names()


def _hugging_face_names(linear: str, model: ModelSpec, names: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    """Hugging Face's name of each group of rows of a linear layer."""
    layer, expert = linear.split(".")[2], model.module(linear).expert
    template = linear.replace(f".{layer}.", ".{layer}.", 1)
    if expert is not None:
        template = template.replace(f".{expert}.", ".{expert}.", 1)
    return {rows: name.format(layer=layer, expert=expert) for rows, name in names.get(template, {}).items()}


def _never_quantized(model: ModelSpec, names: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What no algorithm quantizes, and a user may exclude all the same: vocabularies and routers."""
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
