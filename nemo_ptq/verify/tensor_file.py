# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One file of tensors, opened when it is asked for something."""

import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nemo_ptq.errors import PtqError


@dataclass(frozen=True)
class TensorFile:
    """A .safetensors file; opening reads its header only.

    Raises:
        PtqError: On first use, if the file is missing, truncated or no safetensors file.
    """

    path: Path

    @cached_property
    def _file(self) -> safe_open:
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise PtqError(f"{self.path.name}: not readable as safetensors: {error}") from error

    @property
    def _names(self) -> list[str]:
        return self._file.keys()

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The header's free-form ``__metadata__``, empty where there is none."""
        return self._file.metadata() or {}

    @cached_property
    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (as safetensors spells it) and shape of every tensor, by name."""
        slices = {name: self._file.get_slice(name) for name in self._names}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the file's dtype and shape."""
        if name not in self.header:
            raise PtqError(f"{self.path.name}: tensor {name} is missing")
        # A copy: what has been read of a mapped file counts as this process's memory until the file is closed.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name).clone()


@dataclass(frozen=True)
class TorchFile:
    """A file that ``torch.save`` has written, as older Hugging Face directories have them; mapped, not read.

    Raises:
        PtqError: On first use, if the file is missing, truncated or holds no tensors by name.
    """

    path: Path

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        try:
            tensors = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise PtqError(f"{self.path.name}: not readable as tensors: {str(error).splitlines()[0]}") from error
        if not isinstance(tensors, dict):
            raise PtqError(f"{self.path.name} does not hold tensors by name")
        return tensors

    @cached_property
    def header(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Torch's name of the data type, and shape, of every tensor by name."""
        return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the file's dtype and shape."""
        if name not in self.header:
            raise PtqError(f"{self.path.name}: tensor {name} is missing")
        return self._tensors[name].clone()


def open_tensors(path: Path) -> TensorFile | TorchFile:
    """Opens a file by the end of its name."""
    return TensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)
