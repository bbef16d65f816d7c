# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Read a Hugging Face directory as data: configuration, tensors, tokenizer. Nothing in it is executed."""

import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nemo_ptq.checkpoint.adapters.merging import add_low_rank
from nemo_ptq.checkpoint.adapters.peft_adapter import PeftAdapter
from nemo_ptq.checkpoint.huggingface.hf_files import found_in, read_json
from nemo_ptq.checkpoint.huggingface.stored_tensors import StoredTensor
from nemo_ptq.checkpoint.parts import check_finite
from nemo_ptq.checkpoint.tokenizer_files import tokenizer_problem, tokenizer_way_out
from nemo_ptq.console.quiet import quiet_imports
from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import OF_TRANSFORMERS_5, import_transformers, load_pretrained, tokenizer_settings
from nemo_ptq.untrusted import FileError
from nemo_ptq.untrusted_pickles import check_saved_file

if TYPE_CHECKING:
    from transformers import GenerationConfig


class Weights:
    """The tensors of a Hugging Face directory by name.

    Tensors are memory maps of their files: only tensors that are being converted occupy memory.

    Args:
        stored: Where each tensor is.
        adapter: An adapter that is merged into them; None for none.
    """

    def __init__(self, stored: Mapping[str, StoredTensor], adapter: PeftAdapter | None = None) -> None:
        self._stored, self._adapter = stored, adapter
        # The last file that is a pickle, which is read as a whole.
        self._pickle: tuple[Path, dict[str, torch.Tensor]] | None = None

    def read(self, name: str) -> torch.Tensor:
        """A tensor, memory-mapped; one that an adapter changes in float32.

        Raises:
            PtqError: It has values that are not finite.
        """
        if self._adapter is None:
            return self._read(name, self._stored[name])
        tensor = self._read(*self._adapter.copies.get(name, (name, self._stored[name])))
        if name not in self._adapter.matrices:
            return tensor
        first, second = (self._read(*matrix) for matrix in self._adapter.matrices[name])
        return add_low_rank(tensor, first, second, self._adapter.scale)

    def _read(self, name: str, stored: StoredTensor) -> torch.Tensor:
        file = stored.file
        if file.suffix == ".safetensors":
            tensor = _load_tensor(file, name)
        else:
            if self._pickle is None or self._pickle[0] != file:
                self._pickle = file, load_tensors(file)
            tensor = self._pickle[1][name]
        check_finite(name, tensor)
        return tensor


def load_tokenizer(directory: Path) -> Any:
    """Load transformers' tokenizer, which transformers 4 or 5 has saved, without running code from the directory.

    Raises:
        PtqError: Its files are missing or damaged, or it needs code that the directory brings.
    """
    if problem := tokenizer_problem(directory):
        raise PtqError(problem)
    try:
        has_new_name = tokenizer_settings(directory).get("tokenizer_class") == OF_TRANSFORMERS_5
        with quiet_imports() if has_new_name else nullcontext():  # transformers 4 warns of the name
            return load_pretrained(directory)
    except Exception as error:  # every tokenizer class raises its own kinds
        reason = str(error).partition("\n")[0]
        raise PtqError(
            f"{directory} has no tokenizer that can be loaded ({reason}): {tokenizer_way_out(directory)}; "
            f"{found_in(directory)}"
        ) from error


def load_generation_config(directory: Path) -> "GenerationConfig | None":
    """Load `generation_config.json`; None where there is none.

    Raises:
        PtqError: It cannot be read, or transformers refuses its content.
    """
    if not (directory / "generation_config.json").is_file():
        return None
    content = read_json(directory / "generation_config.json")
    try:
        return import_transformers().GenerationConfig.from_dict(content)
    except Exception as error:  # transformers raises any kind of error
        reason = str(error).partition("\n")[0]
        raise PtqError(f"{directory / 'generation_config.json'} is not valid ({reason}): copy it again") from error


def _load_tensor(file: Path, name: str) -> torch.Tensor:
    """Returns one tensor of a safetensors file, memory-mapped: to map all of them for each one takes longer."""
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> PtqError:
    reason = error.reason if isinstance(error, FileError) else str(error).partition("\n")[0]
    return PtqError(f"{file} cannot be read as tensors ({reason}); is it whole, or a Git LFS pointer?")


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, memory-mapped.

    Raises:
        PtqError: The file is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(check_saved_file(file), map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, FileError) as error:
        raise _damaged(file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise PtqError(f"{file} does not hold tensors by name")
    return tensors
