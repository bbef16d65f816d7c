# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How a Hugging Face directory is quantized, and the tensors that its linear layers are stored as.

There are two descriptions: ModelOpt's, whose rules are those of vLLM's reader (docs/formats.md), and that of the
compressed-tensors library.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from nemo_ptq.errors import PtqError

_WILDCARD = re.compile(r"[*?\[]")
_MOST_WILD = 1000

# Data type as safetensors spells it, and shape; the type None is that of the unquantized tensors.
Spec = tuple[str | None, tuple[int, ...]]


def _fp8(o: int, i: int, g: int) -> dict[str, Spec]:
    return {"weight": ("F8_E4M3", (o, i)), "weight_scale": ("F32", ()), "input_scale": ("F32", ())}


def _int4(o: int, i: int, g: int) -> dict[str, Spec]:
    return {"weight": ("U8", (o // 2, i)), "weight_scale": ("F32", (o, i // g))}


def _w4a8(o: int, i: int, g: int) -> dict[str, Spec]:
    return {**_int4(o, i, g), "weight_scale_2": ("F32", ()), "input_scale": ("F32", ())}


def _nvfp4_weights(o: int, i: int, g: int) -> dict[str, Spec]:
    return {
        "weight": ("U8", (o, i // 2)),
        "weight_scale": ("F8_E4M3", (o, i // g)),
        "weight_scale_2": ("F32", ()),
    }


def _nvfp4(o: int, i: int, g: int) -> dict[str, Spec]:
    return {**_nvfp4_weights(o, i, g), "input_scale": ("F32", ())}


def _fp8_rows(o: int, i: int, g: int) -> dict[str, Spec]:
    return {"weight": ("F8_E4M3", (o, i)), "weight_scale": ("F32", (o,))}


# What a quantized linear layer of (out-features, in-features, group size) is stored as, by ModelOpt's name of it.
_MODELOPT: Mapping[str, Callable[[int, int, int], dict[str, Spec]]] = {
    "FP8": _fp8,
    "W4A16_AWQ": _int4,
    "W4A8_AWQ": _w4a8,
    "NVFP4": _nvfp4,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_rows,
    "W4A16_NVFP4": _nvfp4_weights,
}
_MIXED = "MIXED_PRECISION"
_WITHOUT_GROUPS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


@dataclass(frozen=True)
class Way:
    """How linear layers are quantized and stored.

    Attributes:
        algorithm: The format's name of it.
        group_size: In-features that share a scale; 0 where there are no groups.
        fields: Returns the tensors of a linear layer.
        optional: Further tensors that a linear layer of (out, in) may have.
    """

    algorithm: str
    group_size: int
    fields: Callable[[int, int, int], dict[str, Spec]]
    optional: Callable[[int, int], dict[str, Spec]] = lambda o, i: {}


class Patterns:
    """Shell patterns of the names of layers, most of which are names without wildcards.

    Args:
        patterns: The patterns, in order.

    Raises:
        PtqError: If more have wildcards than any export has.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        wild = [place for place, pattern in enumerate(patterns) if _WILDCARD.search(pattern)]
        if len(wild) > _MOST_WILD:
            raise PtqError(f"{len(wild)} patterns of layers have wildcards, and no export has more than {_MOST_WILD}")
        self._wild = [(place, patterns[place]) for place in wild]
        self._names: dict[str, int] = {}
        for place, pattern in enumerate(patterns):
            self._names.setdefault(pattern, place)

    def first(self, name: str) -> int | None:
        """The place of the first pattern that fits a name, None where none does."""
        exact = self._names.get(name)
        wild = next((place for place, pattern in self._wild if fnmatchcase(name, pattern)), None)
        return min((place for place in (exact, wild) if place is not None), default=None)

    def idle(self, names: Collection[str]) -> list[str]:
        """The patterns that fit none of some names."""
        fitting = {pattern for _, pattern in self._wild if any(fnmatchcase(name, pattern) for name in names)}
        return [pattern for pattern in self._patterns if pattern not in fitting and pattern not in names]


@dataclass(frozen=True)
class Quantization:
    """How a directory is quantized.

    Attributes:
        algorithm: The format's name of it.
        ways: Patterns of the names of linear layers, and how those are quantized; the first that fits counts.
        excluded: Patterns of the names of linear layers that are not quantized.
        kv_cache: Gives the name of the scale that belongs to a k_proj or v_proj, None where no KV cache is quantized.
        kv_spec: Data type and shape of such a scale.
        kv_algorithm: Format of the KV cache: "FP8" or "NVFP4".
    """

    algorithm: str
    ways: tuple[tuple[str, Way], ...]
    excluded: tuple[str, ...]
    kv_cache: Callable[[str], str] | None
    kv_spec: Spec
    kv_algorithm: str = "FP8"

    def way_of(self, module: str) -> Way | None:
        """How a linear layer is quantized, None where it is not."""
        if self.excluded_patterns.first(module) is not None:
            return None
        place = self.way_patterns.first(module)
        return None if place is None else self.ways[place][1]

    @cached_property
    def excluded_patterns(self) -> Patterns:
        """``excluded``, to be compared with names."""
        return Patterns(self.excluded)

    @cached_property
    def way_patterns(self) -> Patterns:
        """The patterns of ``ways``, to be compared with names."""
        return Patterns([pattern for pattern, _ in self.ways])


# What config.json says of a quantized KV cache, by what hf_quant_config.json says.
_MODELOPT_CACHES = {None: None, "FP8": {"dynamic": False, "num_bits": 8, "type": "float"}, "NVFP4": "NVFP4"}


def read_modelopt(content: Mapping[str, Any], document: Mapping[str, Any]) -> Quantization:
    """Reads ModelOpt's description.

    Args:
        content: quantization_config of config.json.
        document: hf_quant_config.json.

    Raises:
        PtqError: If they contradict one another, or are of a quantization that is not known.
    """
    details = json_object(document.get("quantization"), "hf_quant_config.json: quantization")
    producer = json_object(document.get("producer"), "hf_quant_config.json: producer").get("name")
    if producer != "modelopt":
        raise PtqError(f"hf_quant_config.json: the producer is {producer!r}, expected 'modelopt'")
    algorithm = str(details.get("quant_algo"))
    if algorithm != content.get("quant_algo") or algorithm not in (*_MODELOPT, _MIXED):
        raise PtqError(f"quant_algo is {algorithm!r}, in config.json {content.get('quant_algo')!r}")
    if details.get("exclude_modules") != content.get("ignore"):
        raise PtqError("exclude_modules of hf_quant_config.json is not ignore of config.json")
    if details.get("quantized_layers") != content.get("quantized_layers"):
        raise PtqError("quantized_layers of hf_quant_config.json are not those of config.json")
    kv_cache = details.get("kv_cache_quant_algo")
    scheme = content.get("kv_cache_scheme")
    if kv_cache not in [*_MODELOPT_CACHES] or scheme != _MODELOPT_CACHES[kv_cache]:
        raise PtqError(f"kv_cache_quant_algo is {kv_cache!r}, kv_cache_scheme {scheme!r}")
    layers = details.get("quantized_layers") if algorithm == _MIXED else {"*": details}
    layers = json_object(layers, "hf_quant_config.json: quantized_layers")
    return Quantization(
        algorithm,
        tuple((name, _modelopt_way(json_object(its, f"hf_quant_config.json: {name}"))) for name, its in layers.items()),
        tuple(content["ignore"]),
        (lambda name: f"{name}.{name[-6]}_scale") if kv_cache else None,
        ("F32", ()),
        str(kv_cache),
    )


def json_object(value: Any, where: str) -> dict[str, Any]:
    """Returns a value that must be an object.

    Raises:
        PtqError: If it is something else, or empty.
    """
    if not isinstance(value, dict) or not value:
        raise PtqError(f"{where} is {value!r}, expected an object")
    return value


def _modelopt_way(details: dict[str, Any]) -> Way:
    algorithm, group_size = str(details.get("quant_algo")), details.get("group_size", 0)
    if algorithm not in _MODELOPT:
        raise PtqError(f"hf_quant_config.json: quant_algo {algorithm!r} is not known")
    if algorithm not in _WITHOUT_GROUPS and (not isinstance(group_size, int) or group_size < 1):
        raise PtqError(f"hf_quant_config.json: group_size is {group_size!r}")
    has_scales = bool(details.get("pre_quant_scale"))
    return Way(
        algorithm,
        group_size,
        _MODELOPT[algorithm],
        lambda o, i: {"pre_quant_scale": (None, (i,))} if has_scales else {},
    )


def _float_weights(o: int, i: int, g: int) -> dict[str, Spec]:
    return {"weight": ("F8_E4M3", (o, i)), "weight_scale": ("F32", (1,)), "input_scale": ("F32", (1,))}


def _float_rows(o: int, i: int, g: int) -> dict[str, Spec]:
    return {"weight": ("F8_E4M3", (o, i)), "weight_scale": ("F32", (o, 1))}


def _int_rows(o: int, i: int, g: int) -> dict[str, Spec]:
    return {"weight": ("I8", (o, i)), "weight_scale": ("F32", (o, 1))}


def _int_weights(o: int, i: int, g: int) -> dict[str, Spec]:
    return {**_int_rows(o, i, g), "input_scale": ("F32", (1,))}


def _packed_weights(o: int, i: int, g: int) -> dict[str, Spec]:
    return {
        "weight_packed": ("I32", (o, i // 8)),
        "weight_scale": (None, (o, i // g)),
        "weight_shape": ("I64", (2,)),
    }


def _packed_nvfp4(o: int, i: int, g: int) -> dict[str, Spec]:
    return {
        "weight_packed": ("U8", (o, i // 2)),
        "weight_scale": ("F8_E4M3", (o, i // g)),
        "weight_global_scale": ("F32", (1,)),
    }


def _packed_nvfp4_with_inputs(o: int, i: int, g: int) -> dict[str, Spec]:
    return {**_packed_nvfp4(o, i, g), "input_global_scale": ("F32", (1,))}


# What config.json says of weights and of activations: type, bits and strategy, and of activations whether their scales
# are dynamic.
_Arguments = tuple[str, int, str]


@dataclass(frozen=True)
class _Compressed:
    """A way in which the compressed-tensors library stores linear layers.

    Attributes:
        algorithm: The reader's name: the library's format, and its treatment of activations.
        weights: Description of weights in config.json.
        inputs: Description of activations there; None if there must be none.
        fields: The tensors.
    """

    algorithm: str
    weights: _Arguments
    inputs: tuple[_Arguments, object] | None
    fields: Callable[[int, int, int], dict[str, Spec]]

    @property
    def format(self) -> str:
        """The library's name of the format."""
        return self.algorithm.partition(",")[0]


_TOKENS = ("float", 8, "token")
_COMPRESSED = (
    _Compressed("float-quantized", ("float", 8, "tensor"), (("float", 8, "tensor"), False), _float_weights),
    _Compressed("float-quantized, dynamic", ("float", 8, "channel"), (_TOKENS, True), _float_rows),
    _Compressed("int-quantized", ("int", 8, "channel"), (("int", 8, "tensor"), False), _int_weights),
    _Compressed("int-quantized, dynamic", ("int", 8, "channel"), (("int", 8, "token"), True), _int_rows),
    _Compressed("pack-quantized", ("int", 4, "group"), None, _packed_weights),
    _Compressed("pack-quantized, dynamic", ("int", 4, "group"), (_TOKENS, True), _packed_weights),
    _Compressed("nvfp4-pack-quantized", ("float", 4, "tensor_group"), None, _packed_nvfp4),
    _Compressed(
        "nvfp4-pack-quantized, local",
        ("float", 4, "tensor_group"),
        (("float", 4, "tensor_group"), "local"),
        _packed_nvfp4_with_inputs,
    ),
)


def _arguments(content: Mapping[str, Any]) -> _Arguments:
    return str(content.get("type")), int(content.get("num_bits") or 0), str(content.get("strategy"))


def _compressed_cache_scale(name: str) -> str:
    """The scale that belongs to a k_proj or v_proj."""
    return f"{name[:-7]}.{name[-6]}_scale"


def read_compressed_tensors(content: Mapping[str, Any]) -> Quantization:
    """Reads the description of the compressed-tensors library.

    Args:
        content: quantization_config of config.json.

    Raises:
        PtqError: If it is of a quantization that is not known.
    """
    kind, groups = str(content.get("format")), content.get("config_groups")
    is_mixed = kind == "mixed-precision"
    if kind == "dense" and groups == {} and content.get("kv_cache_scheme"):
        return Quantization(kind, (), ("*",), _compressed_cache_scale, ("F32", (1,)))
    is_known = is_mixed or any(way.format == kind for way in _COMPRESSED)
    if not is_known or content.get("quantization_status") != "compressed":
        raise PtqError(f"config.json: format {kind!r} in status {content.get('quantization_status')!r} is not known")
    if not isinstance(groups, dict) or (len(groups) < 2 if is_mixed else len(groups) != 1):
        raise PtqError(f"config.json: config_groups must be {'several groups' if is_mixed else 'one group'}")
    ways: list[tuple[str, Way]] = []
    for group in groups.values():
        targets = json_object(group, "config.json: a group of config_groups").get("targets")
        if not group.get("weights") or not isinstance(targets, list) or not (is_mixed or targets == ["Linear"]):
            raise PtqError("config.json: the group must describe the weights of Linear")
        way = _compressed_way(str(group.get("format")) if is_mixed else kind, group)
        ways += [("*" if name == "Linear" else name, way) for name in targets]
    return Quantization(
        ways[0][1].algorithm if len(groups) == 1 else kind,
        tuple(ways),
        tuple(content.get("ignore") or ()),
        _compressed_cache_scale if content.get("kv_cache_scheme") else None,
        ("F32", (1,)),
    )


def _compressed_way(kind: str, group: dict[str, Any]) -> Way:
    weights = json_object(group["weights"], "config.json: weights of a group")
    inputs = group.get("input_activations") and json_object(
        group["input_activations"], "config.json: input_activations"
    )
    if not all(part.get("symmetric") is True for part in (weights, inputs) if part):
        raise PtqError("config.json: weights and input_activations must be symmetric")
    said = _arguments(weights), (_arguments(inputs), inputs.get("dynamic")) if inputs else None
    ways = [way for way in _COMPRESSED if (way.format, way.weights, way.inputs) == (kind, *said)]
    if not ways or weights.get("dynamic"):
        raise PtqError(f"config.json: {kind} with weights {said[0]} and input_activations {said[1]} is not known")
    return Way(ways[0].algorithm, weights.get("group_size") or 0, ways[0].fields)
