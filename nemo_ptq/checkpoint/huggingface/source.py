# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Read a Hugging Face directory as data: configuration, tensors, tokenizer. Nothing in it is executed."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from nemo_ptq.errors import PtqError

# In the order of preference; each may be split into parts that `<name>.index.json` lists.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# A message names this many files and counts the others.
_NAMES_SHOWN = 10


class Weights:
    """The tensors of a Hugging Face directory by name.

    Tensors are memory maps of their files: only what is being converted occupies memory.

    Args:
        directory: Holds `model.safetensors` or `pytorch_model.bin`, whole or in parts with an index.

    Raises:
        PtqError: There are no weights, files that the index lists are missing, or a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of: dict[str, Path] = {}
        self._meta: dict[str, torch.Tensor] = {}
        for file in _weight_files(directory):
            for name, tensor in _load(file).items():
                self._file_of[name] = file
                self._meta[name] = tensor.to("meta")

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def meta(self, name: str) -> torch.Tensor:
        """The shape and data type of a tensor: the tensor on the meta device.

        Raises:
            PtqError: There is no such tensor.
        """
        if name not in self._meta:
            raise PtqError(f"the weights in {self._directory} lack tensor {name}; is a file missing?")
        return self._meta[name]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, memory-mapped."""
        return _load(self._file_of[name])[name]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        PtqError: The file is missing or does not hold a JSON object.
    """
    if not file.is_file():
        raise PtqError(f"{file.parent} lacks {file.name}; {_found(file.parent)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PtqError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise PtqError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer without running code from the directory.

    Raises:
        PtqError: Its files are missing or damaged, or it needs code that the directory brings.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every tokenizer class raises its own kinds
        reason = str(error).partition("\n")[0]
        raise PtqError(f"{directory} has no tokenizer that can be loaded ({reason}); {_found(directory)}") from error


def load_generation_config(directory: Path) -> GenerationConfig | None:
    """Load `generation_config.json`; None where there is none."""
    if not (directory / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_dict(read_json(directory / "generation_config.json"))


def _weight_files(directory: Path) -> Sequence[Path]:
    for name in _WEIGHTS:
        index = directory / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
        if (directory / name).is_file():
            return [directory / name]
    raise PtqError(f"{directory} has no weights ({' or '.join(_WEIGHTS)}, or their index); {_found(directory)}")


def _indexed_files(index: Path) -> Sequence[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PtqError(f"{index} has no weight_map")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise PtqError(f"{index} names files outside its directory: {', '.join(outside)}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise PtqError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} lists; {_found(index.parent)}")
    return [index.parent / name for name in names]


def _load(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, memory-mapped."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise PtqError(f"{file} cannot be read as tensors ({reason}); is it whole, or a Git LFS pointer?") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise PtqError(f"{file} does not hold tensors by name")
    return tensors


def _found(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"found there: {', '.join(names[:_NAMES_SHOWN]) or 'nothing'}{more}"
