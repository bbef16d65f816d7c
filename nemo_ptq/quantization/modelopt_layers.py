# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How a ModelOpt configuration quantizes a model, by Megatron's or Hugging Face's names. Needs no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from nemo_ptq.errors import PtqError, did_you_mean
from nemo_ptq.models.registry import hugging_face_classes
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.excluded import (
    hugging_face_names,
    hugging_face_table,
    linear_layers,
    never_quantized,
)
from nemo_ptq.quantization.modelopt_file import (
    DEFAULT,
    ModelOptConfig,
    Settings,
    block_size_of,
    caches_in_fp8,
    final_settings,
    scheme_of,
)
from nemo_ptq.quantization.presets import preset_patterns

_LAYER_NUMBER = re.compile(r"layers\.(\d+)\b")
_NUMBER = re.compile(r"\.\d+\.")
# A digit that does not end a word, as in "linear_fc2" or "w1"; or a placeholder for one.
_NAMES_NUMBERS = re.compile(r"(?<![A-Za-z\d])\d|\?|\[!")
_WORD = re.compile(r"[A-Za-z_]\w+")
_CHOICE = re.compile(r"\[[^\]]*\]")
# Further names in ModelOpt's own recipes.
_OTHER_WORDS = (
    *("b_proj", "bmm2_output_quantizer", "encoder", "f_a_proj", "f_b_proj", "fc1_latent_proj", "fc2_latent_proj"),
    *("ffn", "g_proj", "image", "in_proj_qkv", "in_proj_z", "kv_a_proj_with_mqa", "kv_b_proj", "language_model"),
    *("model_encoder", "p_bmm_quantizer", "q_a_proj", "q_b_proj", "radio", "score", "self_conditioning"),
    *("share_expert", "shared_experts", "softmax_quantizer", "to_", "transformer_blocks"),
)
# ModelOpt's settings of the quantizers of linear layers where a configuration sets nothing.
_DEFAULTS: Mapping[str, Settings] = {"weight": (DEFAULT,), "input": (DEFAULT,), "output": ()}


@dataclass(frozen=True)
class Quantized:
    """How a configuration quantizes a model.

    Attributes:
        schemes: ModelOpt's name of the scheme of each linear layer that is quantized, by Megatron's name.
        block_sizes: How many input features share a scale of their weights, 0 where there are no blocks.
        caches: Whether the KV cache is quantized.
        further: Entries of `quant_cfg` that say by Megatron's names what the configuration says by Hugging Face's.
    """

    schemes: Mapping[str, str]
    block_sizes: Mapping[str, int]
    caches: bool
    further: tuple[Mapping[str, Any], ...]


def quantized_by(config: ModelOptConfig, model: ModelSpec) -> Quantized:
    """Returns how a configuration quantizes a model, whose layers it may name as Megatron or as Hugging Face does.

    Raises:
        PtqError: If no format holds it, or if it treats the parts of one layer differently; the message follows the
            file's name.
    """
    numbered = numbered_pattern([entry.pattern for entry in config.entries]) is not None
    table, schemes, block_sizes = hugging_face_table(model), {}, {}
    corrections: dict[str, Settings] = {}
    alike: dict[str, tuple[dict[str, Settings], list[str]]] = {}
    for linear in linear_layers(model):
        kind_of_layer = linear if numbered else _NUMBER.sub(".*.", linear)
        if kind_of_layer not in alike:
            alike[kind_of_layer] = _settings_of(config, linear, hugging_face_names(linear, model, table))
        settings, unseen = alike[kind_of_layer]
        if scheme := scheme_of(config, linear, settings["weight"], settings["input"]):
            schemes[linear], block_sizes[linear] = scheme, block_size_of(settings["weight"])
        corrections |= {f"{linear}.{kind}_quantizer": settings[kind] for kind in unseen}
    cores = [f"decoder.layers.{layer}.self_attention.core_attention" for layer in range(model.num_layers)]
    caches = {caches_in_fp8(config, core) for core in cores}
    if len(caches) > 1:
        raise PtqError("it quantizes the KV cache of some layers only, which no server takes: name all or none")
    return Quantized(schemes, block_sizes, caches == {True}, tuple(_by_kind_of_layer(corrections, model)))


def _settings_of(
    config: ModelOptConfig, linear: str, parts: Mapping[str, str]
) -> tuple[dict[str, Settings], list[str]]:
    """The final settings of a linear layer's quantizers, and which of these are set only by Hugging Face's names.

    Args:
        config: The configuration.
        linear: Megatron's name of the layer.
        parts: Hugging Face's names of its groups of rows.
    """
    found: dict[str, Settings] = {}
    unseen = []
    for kind, default in _DEFAULTS.items():
        name = f"{linear}.{kind}_quantizer"
        wanted = {
            part: final_settings(config, [name, f"{part}.{kind}_quantizer"], default)
            for part in parts.values() or [linear]
        }
        first, *others = wanted
        found[kind] = wanted[first]
        if other := next((part for part in others if wanted[part] != found[kind]), None):
            raise PtqError(
                f"it quantizes {first} and {other} in two ways, and servers load them as one layer: name them together"
            )
        if found[kind] != final_settings(config, [name], default):
            unseen.append(kind)
    if found["output"]:
        raise PtqError(f"it quantizes the output of {linear}, which no format holds: turn off *output_quantizer")
    return found, unseen


def _by_kind_of_layer(corrections: Mapping[str, Settings], model: ModelSpec) -> list[dict[str, Any]]:
    """Entries for quantizers: one for all layers where they are alike, since ModelOpt counts layers in each stage."""
    everywhere: dict[str, list[str]] = {}
    for linear in linear_layers(model):
        for kind in _DEFAULTS:
            name = f"{linear}.{kind}_quantizer"
            everywhere.setdefault(_NUMBER.sub(".*.", name), []).append(name)
    entries = []
    for pattern, names in everywhere.items():
        settings = [corrections.get(name) for name in names]
        if None not in settings and all(its == settings[0] for its in settings):
            entries.append(_entry(pattern, corrections[names[0]]))
        else:
            entries += [_entry(name, corrections[name]) for name in names if name in corrections]
    return entries


def _entry(pattern: str, settings: Settings) -> dict[str, Any]:
    if not settings:
        return {"quantizer_name": pattern, "enable": False}
    stages = [dict(stage) for stage in settings]
    return {"quantizer_name": pattern, "cfg": stages if len(stages) > 1 else stages[0], "enable": True}


def numbered_pattern(patterns: Sequence[str]) -> str | None:
    """Returns a pattern that may name a layer or an expert by its number, if there is one."""
    return next((pattern for pattern in patterns if _NAMES_NUMBERS.search(pattern)), None)


def unknown_to_modelopt(patterns: Sequence[str], model: ModelSpec) -> tuple[str, str] | None:
    """Finds a pattern that matches none of a model's quantizers, and is not meant for other models.

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
    table = hugging_face_table(model)
    linears = [
        own for linear in linear_layers(model) for own in (linear, *hugging_face_names(linear, model, table).values())
    ]
    cores = [f"decoder.layers.{layer}.self_attention.core_attention" for layer in range(model.num_layers)]
    modules = [*linears, *never_quantized(model, table)]
    found = [f"{module}.{kind}_quantizer" for module in modules for kind in _DEFAULTS]
    return found + [f"{core}.{which}_bmm_quantizer" for core in cores for which in "qkv"]


@cache
def _words_of_other_models() -> frozenset[str]:
    """The parts of the names that other models' modules have, as far as they are known here."""
    tables = [hf_class.module_names() for hf_class in hugging_face_classes().values()]
    names = {name for table in tables for module, own in table.items() for name in (module, *own.values())}
    return frozenset({part for name in {*names, *preset_patterns()} for part in name.split(".")} | set(_OTHER_WORDS))
