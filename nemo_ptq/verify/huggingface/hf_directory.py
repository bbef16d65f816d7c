# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as its readers see it: which tensors config.json promises, and whether they are there.

These follow from the architecture and the sizes in config.json; every linear layer that is not excluded must be stored
as the quantization says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import import_transformers
from nemo_ptq.verify.huggingface.architectures import (
    ARCHITECTURES,
    Architecture,
    StoredModule,
    model_config,
    setting_problems,
    stored_modules,
)
from nemo_ptq.verify.huggingface.hf_quantization import (
    Quantization,
    Spec,
    Way,
    json_object,
    read_compressed_tensors,
    read_modelopt,
)
from nemo_ptq.verify.huggingface.nemotron_h import hybrid_config, hybrid_modules
from nemo_ptq.verify.model_config import MOST_LAYERS, ModelConfig, load_json
from nemo_ptq.verify.tensor_file import TensorFile, TorchFile, open_tensors

INDEX = "model.safetensors.index.json"
# In the order of preference; each may be split into parts that `<name>.index.json` lists.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


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
        content = json_object(content, "config.json: quantization_config")
        if content.get("quant_method") == "modelopt":
            return read_modelopt(content, load_json(self.path / "hf_quant_config.json"))
        if content.get("quant_method") == "compressed-tensors":
            return read_compressed_tensors(content)
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
