# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Read a Hugging Face directory as data: configuration, tensors, tokenizer. Nothing in it is executed."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from nemo_ptq.checkpoint.huggingface.hf_files import found_in, read_json, weight_files
from nemo_ptq.errors import PtqError


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
        for file in weight_files(directory):
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


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer without running code from the directory.

    Raises:
        PtqError: Its files are missing or damaged, or it needs code that the directory brings.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every tokenizer class raises its own kinds
        reason = str(error).partition("\n")[0]
        raise PtqError(f"{directory} has no tokenizer that can be loaded ({reason}); {found_in(directory)}") from error


def load_generation_config(directory: Path) -> GenerationConfig | None:
    """Load `generation_config.json`; None where there is none.

    Raises:
        PtqError: It cannot be read, or transformers does not take what it says.
    """
    if not (directory / "generation_config.json").is_file():
        return None
    content = read_json(directory / "generation_config.json")
    try:
        return GenerationConfig.from_dict(content)
    except Exception as error:  # transformers raises what it likes
        reason = str(error).partition("\n")[0]
        raise PtqError(f"{directory / 'generation_config.json'} is not valid ({reason}): copy it again") from error


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
