# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Read a Hugging Face directory as data: configuration, tensors, tokenizer. Nothing in it is executed."""

import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_ptq.checkpoint.huggingface.hf_files import found_in, read_json
from nemo_ptq.checkpoint.huggingface.stored_tensors import StoredTensor
from nemo_ptq.checkpoint.parts import check_finite
from nemo_ptq.console.quiet import quiet_imports
from nemo_ptq.errors import PtqError


class Weights:
    """The tensors of a Hugging Face directory by name.

    Tensors are memory maps of their files: only what is being converted occupies memory.

    Args:
        stored: Which there are.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def meta(self, name: str) -> torch.Tensor:
        """The shape and data type of a tensor: an empty tensor on the meta device."""
        stored = self._stored[name]
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")

    def read(self, name: str) -> torch.Tensor:
        """A tensor, memory-mapped.

        Raises:
            PtqError: It has values that are not finite.
        """
        tensor = load_tensors(self._stored[name].file)[name]
        check_finite(name, tensor)
        return tensor


# What transformers 5 calls the class that it had called PreTrainedTokenizerFast before.
_OF_TRANSFORMERS_5 = "TokenizersBackend"


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer, which transformers 4 or 5 has saved, without running code from the directory.

    Raises:
        PtqError: Its files are missing or damaged, or it needs code that the directory brings.
    """
    try:
        file = directory / "tokenizer_config.json"
        settings = read_json(file) if file.is_file() else {}
        has_new_name = settings.get("tokenizer_class") == _OF_TRANSFORMERS_5
        further: dict[str, Any] = {}
        if isinstance(extra := settings.get("extra_special_tokens"), list):  # an object in transformers 4
            further = {"extra_special_tokens": {}, "additional_special_tokens": extra}
        load: Any = PreTrainedTokenizerFast if has_new_name else AutoTokenizer
        with quiet_imports() if has_new_name else nullcontext():  # it warns of the name
            return load.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **further)
    except Exception as error:  # every tokenizer class raises its own kinds
        reason = str(error).partition("\n")[0]
        raise PtqError(
            f"{directory} has no tokenizer that can be loaded ({reason}): give it the tokenizer's files that the model "
            f"was published with; {found_in(directory)}"
        ) from error


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


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, memory-mapped.

    Raises:
        PtqError: The file is damaged.
    """
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
