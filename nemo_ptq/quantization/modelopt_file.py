# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A ModelOpt configuration of the user's own, as data: ModelOpt itself takes many seconds to import.

ModelOpt checks more closely once the job runs; errors that would change the model, or leave none, are found here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError, did_you_mean
from nemo_ptq.quantization.modelopt_recipes import find_recipe, read_recipe

_WANTED = "an object of patterns and what they set, or a list of objects with quantizer_name and cfg or enable"
_KEYS = ("quant_cfg", "algorithm", "effective_bits")
_RECIPE_KEYS = ("metadata", "quantize")
_ENTRY_KEYS = ("quantizer_name", "parent_class", "cfg", "enable")
# Settings of a quantizer, and those among them that do not change the export, whose scales hold the calibration.
ATTRIBUTES = (
    *("axis", "backend", "backend_extra_args", "bias", "block_sizes", "calibrator", "constant_amax"),
    *("effective_bits", "enable", "fake_quant", "learn_amax", "narrow_range", "num_bits", "pass_through_bwd"),
    *("rotate", "trt_high_precision_dtype", "type", "unsigned", "use_constant_amax"),
)
_HARMLESS = (
    "calibrator",
    "effective_bits",
    "enable",
    "fake_quant",
    "narrow_range",
    "pass_through_bwd",
    "trt_high_precision_dtype",
)
_COMMON = ("method", "layerwise", "moe_calib_experts_ratio")
_SCALES = ("distributed_sync", "shared_states")
_SEARCH = ("start_multiplier", "step_size", "stop_multiplier")
_CLIP = ("debug", "max_co_batch_size", "max_tokens_per_batch", "min_clip_ratio", "shrink_step")
METHODS: Mapping[str, tuple[str, ...]] = {
    "max": (*_COMMON, *_SCALES, "skip_forward_without_activation_calib", "sync_expert_weight_amax"),
    "mse": (*_COMMON, *_SCALES, *_SEARCH, "fp8_scale_sweep"),
    "smoothquant": (*_COMMON, "alpha"),
    "awq_lite": (*_COMMON, "alpha_step", "debug"),
    "awq_clip": (*_COMMON, *_CLIP),
    "awq_full": (*_COMMON, *_CLIP, "alpha_step"),
}
"""ModelOpt's calibration methods whose result the exports hold, and the settings of each."""
# The other methods, and their replacements.
_OTHER_METHODS = {
    "gptq": "it changes weights, and exports are packed from the checkpoint's: use quality=balanced, which has GPTQ",
    "svdquant": "it adds low-rank weights, which no format here holds",
    "lsq": "it is for training",
    "local_hessian": "its block scales are of a kind that no format here holds: quality=balanced learns from Hessians",
    "nvfp4_act_headroom": "its results were never compared here: use algorithm=nvfp4",
}
# How a layer's weights and inputs are set in each scheme, by ModelOpt's name of the scheme.
_FP8, _NVFP4 = {"num_bits": (4, 3)}, {"num_bits": (2, 1), "block": 16, "scale_bits": (4, 3), "is_dynamic": True}
_INT8_ROWS, _INT8 = {"num_bits": 8, "axis": 0}, {"num_bits": 8}
DEFAULT = {"num_bits": 8, "axis": None}
"""ModelOpt's settings of the quantizers of weights and inputs where a configuration sets nothing."""

Settings = tuple[Mapping[str, Any], ...]
"""Settings of a quantizer: several where it has several stages."""


@dataclass(frozen=True)
class QuantizerEntry:
    """A configuration's settings for some quantizers.

    Attributes:
        pattern: The quantizers, by their names in Megatron's model; `*` of a whole model or of a class of modules.
        settings: Their settings; None leaves them as they are.
        turns_off: Whether it turns them off.
        parent_class: The class of modules that it is about; None for all.
    """

    pattern: str
    settings: Settings | None
    turns_off: bool
    parent_class: str | None = None


@dataclass(frozen=True)
class ModelOptConfig:
    """A configuration.

    Attributes:
        content: The configuration as ModelOpt takes it, in JSON types.
        entries: Its settings for quantizers; later ones take precedence.
        method: Its calibration method; None computes nothing.
    """

    content: Mapping[str, Any]
    entries: Sequence[QuantizerEntry]
    method: str | None


def read_config(file: Path) -> ModelOptConfig:
    """Reads a configuration in any of ModelOpt's forms: as its Python has it, as a preset, or as a recipe.

    Args:
        file: The file, or the name of one of ModelOpt's recipes.

    Raises:
        FileError: If the file cannot be read.
        PtqError: If it is not a configuration, or none whose result can be exported; the message follows the file's
            name.
    """
    content = read_recipe(find_recipe(file))
    if isinstance(content, dict) and "metadata" in content:
        content = _of_recipe(content)
    if not isinstance(content, dict) or "quant_cfg" not in content:
        raise PtqError('it must hold an object with the keys "quant_cfg" and "algorithm"')
    _check_keys(content, _KEYS, "it")
    entries = content["quant_cfg"]
    if not isinstance(entries, dict | list) or not entries:
        raise PtqError(f"its quant_cfg is {_shown(entries)}, and must be {_WANTED}")
    method = _method(content.get("algorithm", "max"))
    return ModelOptConfig(content, [entry for pair in _pairs(entries) for entry in _entries(*pair)], method)


def _of_recipe(recipe: Mapping[str, Any]) -> Any:
    """The configuration in a recipe."""
    metadata = recipe["metadata"]
    kind = metadata.get("recipe_type") if isinstance(metadata, Mapping) else None
    if kind == "auto_quantize":
        raise PtqError(
            "it is a recipe of type auto_quantize: give quantization_config.algorithm=auto, with effective_bits and "
            "candidates as the recipe has them"
        )
    if kind != "ptq":
        raise PtqError(f"it is a recipe of type {kind}, and must be one of type ptq")
    _check_keys(recipe, _RECIPE_KEYS, "it")
    return recipe.get("quantize")


def _method(algorithm: Any) -> str | None:
    """The calibration method of a configuration."""
    settings = algorithm if isinstance(algorithm, Mapping) else {"method": algorithm}
    method = settings.get("method")
    if method is None and not settings.keys() - {"method"}:
        return None
    if not isinstance(method, str) or method not in METHODS:
        reason = _OTHER_METHODS.get(str(method)) or f"the methods whose results are exported are {', '.join(METHODS)}"
        raise PtqError(f"its algorithm is {_shown(method)}: {reason}")
    _check_keys(settings, METHODS[method], f"its algorithm {method}")
    layerwise = settings.get("layerwise")
    if layerwise is True or (isinstance(layerwise, Mapping) and layerwise.get("enable")):
        raise PtqError("its algorithm has layerwise: ModelOpt calibrates the whole model here, so take it out")
    return method


def _pairs(entries: Mapping[Any, Any] | Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Patterns and what is set; the catch-all of ModelOpt's former form comes first, wherever it was written."""
    if isinstance(entries, Mapping):
        yield from sorted(entries.items(), key=lambda pair: pair[0] != "default")
        return
    for entry in entries:
        if not isinstance(entry, Mapping) or not entry:
            raise PtqError(f"its quant_cfg has the entry {_shown(entry)}, and must be {_WANTED}")
        yield from [(entry["quantizer_name"], entry)] if "quantizer_name" in entry else entry.items()


def _entries(pattern: Any, value: Any, parent_class: str | None = None) -> Iterator[QuantizerEntry]:
    if not isinstance(pattern, str):
        raise PtqError(f"its quant_cfg has the pattern {_shown(pattern)}, which must be a text")
    if pattern.startswith("nn.") and isinstance(value, Mapping) and "quantizer_name" not in value:
        for name, inner in value.items():  # patterns of a class of modules
            yield from _entries(name, inner, pattern)
        return
    if not isinstance(value, Mapping | list):
        raise PtqError(f"its quant_cfg has {_shown(value)} for {pattern}, which must be an object such as num_bits: 8")
    settings: Any = value
    if isinstance(value, Mapping) and "quantizer_name" in value:
        _check_keys(value, _ENTRY_KEYS, f"its entry for {pattern}")
        parent_class, settings = value.get("parent_class"), value.get("cfg")
    enable = value.get("enable", True) if isinstance(value, Mapping) else True
    if not isinstance(enable, bool):
        raise PtqError(f"its quant_cfg has enable {_shown(enable)} for {pattern}, which must be true or false")
    name = "*" if pattern == "default" else pattern
    yield QuantizerEntry(name, _settings(pattern, settings), not enable, parent_class)


def _settings(pattern: str, settings: Any) -> Settings | None:
    stages = settings if isinstance(settings, list) else [settings or {}]
    for stage in stages:
        if not isinstance(stage, Mapping):
            raise PtqError(f"its quant_cfg has {_shown(stage)} for {pattern}, which must be an object")
        _check_keys(stage, ATTRIBUTES, f"its entry for {pattern}")
    # Nothing but a switch leaves a quantizer as it is.
    return tuple(stages) if any(stage.keys() - {"enable"} for stage in stages) else None


def _check_keys(found: Mapping[Any, Any], known: Collection[str], owner: str) -> None:
    for key in found:
        if key not in known:
            hint = did_you_mean(str(key), list(known)) or f": it can have {', '.join(known)}"
            raise PtqError(f"{owner} has the key {_shown(key)}, which ModelOpt does not know{hint}")


def final_settings(config: ModelOptConfig, names: Collection[str], default: Settings) -> Settings:
    """Returns a quantizer's final settings, stage by stage; nothing where it is off.

    Args:
        config: The configuration.
        names: The quantizer's names.
        default: ModelOpt's settings where the configuration sets nothing.
    """
    settings, is_on = default, bool(default)
    for entry in config.entries:
        # Recipes name classes of modules that are none of ours, such as batch norms.
        if entry.parent_class is None and any(fnmatchcase(name, entry.pattern) for name in names):
            settings, is_on = entry.settings or settings, not entry.turns_off
    return settings if is_on else ()


def scheme_of(config: ModelOptConfig, linear: str, weight: Settings, inputs: Settings) -> str | None:
    """Returns ModelOpt's name of the scheme that stores a linear layer; None where it is not quantized.

    Args:
        config: The configuration.
        linear: The layer's name.
        weight: Settings of its weight quantizer.
        inputs: Settings of its input quantizer.

    Raises:
        PtqError: If no format holds the layer; the message follows the file's name.
    """
    if not weight and not inputs:
        return None
    if weight == (DEFAULT,):
        raise PtqError(
            f"it says nothing of the weight of {linear}, which ModelOpt then quantizes to INT8: begin with "
            'quantizer_name: "*" and enable: false'
        )
    scheme = _scheme(weight, inputs, config.method)
    if scheme is None:
        raise PtqError(
            f"it quantizes {linear} with weights of {_described(weight)} and inputs of {_described(inputs)}, by "
            f"algorithm {config.method}, which is not exported from a file: set both as ModelOpt's preset fp8, "
            "int8_smoothquant, int4_awq, w4a8_awq_beta, nvfp4 or w4a16_nvfp4 does, or give one of our algorithms, such "
            "as fp8_dynamic"
        )
    return scheme


def block_size_of(weight: Settings) -> int:
    """Returns how many input features of a weight share a scale; 0 where there are no blocks."""
    block = _plain(weight)[0].get("block", 0) if weight else 0
    return block if isinstance(block, int) else 0


def caches_in_fp8(config: ModelOptConfig, core: str) -> bool:
    """Returns whether a configuration quantizes the KV cache of a core attention module.

    Raises:
        PtqError: If it does so in a format other than FP8, or quantizes attention itself; the message follows the
            file's name.
    """
    for name in ("q_bmm_quantizer", "p_bmm_quantizer", "softmax_quantizer", "bmm2_output_quantizer"):
        if final_settings(config, [f"{core}.{name}"], ()):
            raise PtqError(f"it quantizes attention itself (*{name}), which no format holds: turn that off")
    key, value = (final_settings(config, [f"{core}.{kind}_bmm_quantizer"], ()) for kind in "kv")
    if not key and not value:
        return False
    if any(_plain(stages) not in ([_FP8], [_FP8 | {"use_constant_amax": True}]) for stages in (key, value)):
        raise PtqError(
            f"it quantizes the KV cache with keys of {_described(key)} and values of {_described(value)}, and only "
            "FP8 (num_bits: e4m3) for both is held: take it out, or use ModelOpt's kv_fp8 or kv_fp8_cast"
        )
    return True


def _scheme(weight: Settings, inputs: Settings, method: str | None) -> str | None:
    """ModelOpt's name of a layer's scheme; None where no scheme here is computed by the method."""
    weights, activations = _plain(weight), [_without_constants(stage) for stage in _plain(inputs)]
    block = weights[0].get("block") if weights else None
    int4 = {"num_bits": 4, "block": block} if isinstance(block, int) else {}
    static = ("max", "mse")
    for name, stages, other, methods in (
        ("fp8", [_FP8], [_FP8], static),
        ("int8_sq", [_INT8_ROWS], [_INT8], (*static, "smoothquant")),
        ("int4_awq", [int4], [], (*static, "awq_lite", "awq_clip", "awq_full")),
        ("w4a8_awq", [int4, _FP8], [_FP8], ("max", "awq_lite", "awq_clip", "awq_full")),
        ("nvfp4", [_NVFP4], [_NVFP4], ("max",)),
        ("w4a16_nvfp4", [_NVFP4], [], ("max",)),
    ):
        if weights == stages and activations == other and method in methods:
            return name
    return None


def _plain(stages: Settings) -> list[dict[str, Any]]:
    """The settings that decide how values are stored, in one spelling."""
    return [_one_spelling(stage) for stage in stages]


def _one_spelling(stage: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        key: value for key, value in stage.items() if key not in _HARMLESS and value is not None and value is not False
    }
    if stage.get("fake_quant") is False:  # which rounds for good
        found["fake_quant"] = False
    bits, kind = found.get("num_bits", 8), found.pop("type", "static")
    found["num_bits"] = tuple(bits) if isinstance(bits, list | tuple) else bits
    if isinstance(blocks := found.pop("block_sizes", None), Mapping):
        sizes = {str(key): value for key, value in blocks.items() if value is not None}
        kind = sizes.pop("type", kind)
        if "-1" in sizes:
            found["block"] = sizes.pop("-1")
        if "scale_bits" in sizes:
            scale = sizes.pop("scale_bits")
            found["scale_bits"] = tuple(scale) if isinstance(scale, list | tuple) else scale
        found |= {f"block_sizes.{key}": value for key, value in sizes.items()}
    return found | ({"is_dynamic": True} if kind == "dynamic" else {})


def _without_constants(stage: Mapping[str, Any]) -> dict[str, Any]:
    """An input's settings but for an amax that the configuration gives."""
    return {key: value for key, value in stage.items() if key != "constant_amax"}


def _described(stages: Settings) -> str:
    texts = [", ".join(f"{key} {value}" for key, value in stage.items()) for stage in _plain(stages)]
    return " and then ".join(texts) or "16 bits"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
