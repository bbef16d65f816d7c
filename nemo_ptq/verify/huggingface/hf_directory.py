# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as its readers see it: which tensors config.json promises, and whether they are there.

What there must be follows from the architecture and the sizes in config.json, and every linear layer that is not
excluded must be stored as the quantization says. The rules of ModelOpt's format are those of
vLLM's reader (docs/formats.md), those of the other are compressed-tensors' own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import TOKENS_WITHOUT_ROWS, import_transformers, load_pretrained
from nemo_ptq.verify.huggingface.architectures import (
    ARCHITECTURES,
    Architecture,
    StoredModule,
    model_config,
    setting_problems,
    stored_modules,
)
from nemo_ptq.verify.huggingface.nemotron_h import hybrid_config, hybrid_modules
from nemo_ptq.verify.model_config import MOST_LAYERS, ModelConfig, load_json
from nemo_ptq.verify.side_by_side import side_by_side
from nemo_ptq.verify.tensor_file import TensorFile, TorchFile, open_tensors

INDEX = "model.safetensors.index.json"
# In the order of preference; each may be split into parts that `<name>.index.json` lists.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

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
        if any(fnmatchcase(module, pattern) for pattern in self.excluded):
            return None
        return next((way for pattern, way in self.ways if fnmatchcase(module, pattern)), None)


def is_hugging_face(directory: Path) -> bool:
    """Whether a directory is in one of the formats that transformers knows; qnemo's config.json names no model type."""
    try:
        return "model_type" in load_json(directory / "config.json")
    except PtqError:
        return False


# What transformers' classes make a list for each layer by.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class HuggingFaceDirectory:
    """A directory; files are opened when they are asked for."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return load_json(self.path / "config.json")

    @cached_property
    def _opened(self) -> dict[str, TensorFile | TorchFile]:
        return {name: open_tensors(self.path / name) for name in sorted(set(self.files.values()))}

    @cached_property
    def files(self) -> dict[str, str]:
        """Which file holds which tensor, by what the index or the only file says.

        Raises:
            PtqError: If there are no weights, or they cannot be read.
        """
        for weights in _WEIGHTS:
            index = f"{weights}.index.json"
            if (self.path / index).is_file():
                files = load_json(self.path / index).get("weight_map")
                if not isinstance(files, dict) or not all(Path(str(name)).name == name for name in files.values()):
                    raise PtqError(f"{index}: weight_map is no object of file names")
                return files
            if (self.path / weights).is_file():
                return dict.fromkeys(open_tensors(self.path / weights).header, weights)
        raise PtqError(f"{self.path} has no weights ({' or '.join(_WEIGHTS)}, or their index)")

    @cached_property
    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Data type and shape of every tensor that the files hold."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in self._opened.values():
            found |= file.header
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a tensor.

        Raises:
            PtqError: If there is none of that name.
        """
        return self._file_of(name).tensor(name)

    def has_only_finite(self, name: str) -> bool:
        """Whether a tensor of floating-point numbers has neither NaN nor infinity.

        Raises:
            PtqError: If there is none of that name.
        """
        return self._file_of(name).has_only_finite(name)

    def _file_of(self, name: str) -> TensorFile | TorchFile:
        if name not in self.files:
            raise PtqError(f"{self.path}: the weights lack {name}")
        return self._opened[self.files[name]]

    @cached_property
    def transformers_config(self) -> Any:
        """Transformers' configuration of the model without its quantization, with the defaults of its class.

        Raises:
            PtqError: If transformers does not know the model.
        """
        transformers = import_transformers()
        content = {key: value for key, value in self.config.items() if key != "quantization_config"}
        for name in _LAYERS:
            layers = content.get(name, 1)
            if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
                raise PtqError(f"config.json: {name} is {layers!r}, expected a positive integer up to {MOST_LAYERS}")
        try:
            return transformers.AutoConfig.for_model(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise PtqError(
                f"config.json is of no model that transformers knows: {str(error).splitlines()[0]}"
            ) from error

    @property
    def architecture(self) -> Architecture:
        """What the model computes.

        Raises:
            PtqError: If it is not one of :data:`~nemo_ptq.verify.huggingface.architectures.ARCHITECTURES`.
        """
        given = self.config.get("architectures")
        name = str(given[0]) if isinstance(given, list) and given else f"{given!r}"
        if name not in ARCHITECTURES:
            raise PtqError(f"{self.path} is of architecture {name}, not one of {', '.join(ARCHITECTURES)}")
        return ARCHITECTURES[name]

    @cached_property
    def model_config(self) -> ModelConfig:
        """The model's sizes.

        Raises:
            PtqError: If config.json has settings that the forward pass does not compute.
        """
        if self.architecture.is_hybrid:
            return hybrid_config(self.config)
        if problems := setting_problems(self.config, self.transformers_config):
            raise PtqError(f"config.json {problems[0]}")
        return model_config(self.transformers_config, self.architecture)

    @cached_property
    def modules(self) -> dict[str, StoredModule]:
        """The model's modules that have a weight."""
        of_model = hybrid_modules if self.architecture.is_hybrid else stored_modules
        return of_model(self.architecture, self.model_config)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How it is quantized, None where it is not.

        Raises:
            PtqError: If the quantization is not one that is known.
        """
        content = self.config.get("quantization_config")
        if content is None:
            return None
        content = _object(content, "config.json: quantization_config")
        if content.get("quant_method") == "modelopt":
            return _modelopt(content, load_json(self.path / "hf_quant_config.json"))
        if content.get("quant_method") == "compressed-tensors":
            return _compressed(content)
        raise PtqError(f"config.json: quant_method {content.get('quant_method')!r} is not known")

    @property
    def quantized(self) -> Iterator[tuple[str, StoredModule, Way]]:
        """The linear layers that are quantized, and how."""
        for name, module in self.modules.items():
            if module.kind == "linear" and self.quantization and (way := self.quantization.way_of(name)):
                yield name, module, way

    @cached_property
    def expected(self) -> dict[str, Spec]:
        """Every tensor that config.json promises."""
        specs: dict[str, Spec] = {}
        for name, module in self.modules.items():
            if name != "lm_head" or not self.model_config.share_embedding_table:
                specs |= {f"{name}.{weight}": (None, module.shape) for weight in module.weights}
            if module.has_bias:
                specs[f"{name}.bias"] = (None, module.shape[:1])
        for name, _, way in self.quantized:
            out, inputs = specs.pop(f"{name}.weight")[1]
            specs |= {f"{name}.{field}": spec for field, spec in way.fields(out, inputs, way.group_size).items()}
        quantization = self.quantization
        if quantization is not None and quantization.kv_cache is not None:
            values = [name for name in self.modules if name.endswith((".k_proj", ".v_proj"))]
            specs |= {quantization.kv_cache(name): quantization.kv_spec for name in values}
        return specs

    @cached_property
    def optional(self) -> dict[str, Spec]:
        """Tensors that there may be."""
        return {
            f"{name}.{field}": spec
            for name, module, way in self.quantized
            for field, spec in way.optional(*module.shape).items()
        }


# What config.json says of a quantized KV cache, by what hf_quant_config.json says.
_MODELOPT_CACHES = {None: None, "FP8": {"dynamic": False, "num_bits": 8, "type": "float"}, "NVFP4": "NVFP4"}


def _modelopt(content: dict[str, Any], document: dict[str, Any]) -> Quantization:
    details = _object(document.get("quantization"), "hf_quant_config.json: quantization")
    producer = _object(document.get("producer"), "hf_quant_config.json: producer").get("name")
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
    layers = _object(layers, "hf_quant_config.json: quantized_layers")
    return Quantization(
        algorithm,
        tuple((name, _modelopt_way(_object(its, f"hf_quant_config.json: {name}"))) for name, its in layers.items()),
        tuple(content["ignore"]),
        (lambda name: f"{name}.{name[-6]}_scale") if kv_cache else None,
        ("F32", ()),
        str(kv_cache),
    )


def _object(value: Any, where: str) -> dict[str, Any]:
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


def _compressed(content: dict[str, Any]) -> Quantization:
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
        targets = _object(group, "config.json: a group of config_groups").get("targets")
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
    weights = _object(group["weights"], "config.json: weights of a group")
    inputs = group.get("input_activations") and _object(group["input_activations"], "config.json: input_activations")
    if not all(part.get("symmetric") is True for part in (weights, inputs) if part):
        raise PtqError("config.json: weights and input_activations must be symmetric")
    said = _arguments(weights), (_arguments(inputs), inputs.get("dynamic")) if inputs else None
    ways = [way for way in _COMPRESSED if (way.format, way.weights, way.inputs) == (kind, *said)]
    if not ways or weights.get("dynamic"):
        raise PtqError(f"config.json: {kind} with weights {said[0]} and input_activations {said[1]} is not known")
    return Way(ways[0].algorithm, weights.get("group_size") or 0, ways[0].fields)


def config_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Problems of config.json, hf_quant_config.json and the model that they describe."""
    problems = []
    model_type, expected = directory.config.get("model_type"), directory.architecture.model_type
    if model_type != expected:
        problems.append(f"architectures is {directory.config['architectures']!r}, model_type {model_type!r}")
    problems += _activation_problems(directory)
    quantization = directory.quantization
    if quantization is not None:
        layers = [name for name, module in directory.modules.items() if module.kind in ("embedding", "linear")]
        idle = [p for p in quantization.excluded if not any(fnmatchcase(name, p) for name in layers)]
        problems += [f"{pattern} is excluded and no layer" for pattern in idle]
        lost = [p for p, _ in quantization.ways if not any(fnmatchcase(name, p) for name in layers)]
        problems += [f"{pattern} is quantized and no layer" for pattern in lost]
        if not any(directory.quantized) and quantization.algorithm != "dense":
            problems.append("no linear layer is quantized")
    return problems


def _activation_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Where transformers and vLLM, which look at different settings, would compute different activations."""
    if directory.architecture.model_type != "gemma":
        return []
    transformers, vllm = (directory.config.get(name) for name in ("hidden_act", "hidden_activation"))
    if transformers == vllm == "gelu_pytorch_tanh":
        return []
    return [
        f"hidden_act is {transformers!r}, which transformers reads, and hidden_activation {vllm!r}, which vLLM reads: "
        "both must be 'gelu_pytorch_tanh'"
    ]


def tensor_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Where the files do not hold what config.json promises."""
    unquantized = _DTYPES[directory.model_config.dtype]
    wanted, optional, found = directory.expected, directory.optional, directory.header
    strays = {path.name for path in directory.path.glob("*.safetensors")} - set(directory.files.values())
    problems = [f"{name} is in no index" for name in sorted(strays)]
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys() - optional.keys())]
    if directory.files.keys() != found.keys():
        problems.append(f"{INDEX} lists other tensors than the files hold")
    # Servers have these in float32, and files may.
    states = {
        f"{name}.{weight}"
        for name, module in directory.modules.items()
        if module.kind == "state"
        for weight in module.weights
    }
    for name, (dtype, shape) in {**optional, **wanted}.items():
        if name in states and found.get(name) == ("F32", shape):
            continue
        if name in found and found[name] != (dtype or unquantized, shape):
            problems.append(f"{name} is {found[name]}, expected {(dtype or unquantized, shape)}")
    return problems


def value_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Tensors that are not finite, and scales that are not positive."""
    names = [name for name, (dtype, _) in directory.header.items() if dtype in ("BF16", "F16", "F32", "F8_E4M3")]
    return [problem for problem in side_by_side(partial(_value_problem, directory), names, True) if problem]


def _value_problem(directory: HuggingFaceDirectory, name: str) -> str | None:
    if not directory.has_only_finite(name):
        return f"{name} has values that are not finite"
    if name.endswith(("_scale", "_scale_2")):
        tensor = directory.tensor(name)
        scales = tensor.float()
        if not (scales >= 0 if tensor.dtype == torch.float8_e4m3fn else scales > 0).all():
            return f"{name} has scales that are not positive"
    return None


def tokenizer_problems(directory: HuggingFaceDirectory, text: str = "The quick brown fox") -> list[str]:
    """Problems that keep transformers from using the tokenizer, offline and without code from the directory."""
    tokenizer = load_pretrained(directory.path)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    problems = []
    if tokenizer.decode(tokens).strip() != text:
        problems.append(f"{text!r} becomes {tokenizer.decode(tokens)!r} when encoded and decoded")
    rows = directory.model_config.vocab_size
    if len(tokenizer) - len(TOKENS_WITHOUT_ROWS & tokenizer.get_added_vocab().keys()) > rows:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows")
    return problems
