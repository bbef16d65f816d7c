# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One file of tensors, opened when it is asked for something."""

import io
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import FileError, check_regular
from nemo_ptq.untrusted_pickles import check_saved_file

# The data types of the files that are verified, as safetensors spells them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# The bits of infinity by data type; E4M3 has none, and these are its NaN.
_INFINITY: Mapping[str, np.unsignedinteger[Any]] = {
    "F32": np.uint32(0x7F800000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F8_E4M3": np.uint8(0x7F),
}
# Bytes that are looked at at a time: so few stay in a core's cache.
_READ_AT_ONCE = 1 << 21


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
            # As NumPy's: for torch the library maps files so that all of them count as this process's own memory.
            return safe_open(check_regular(self.path), framework="numpy")
        except (OSError, SafetensorError, FileError) as error:
            reason = error.reason if isinstance(error, FileError) else error
            raise PtqError(f"{self.path.name}: not readable as safetensors: {reason}") from error

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

    @cached_property
    def _offsets(self) -> dict[str, int]:
        """First byte of each tensor; the library has checked the header, but does not expose offsets."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        return {name: 8 + length + entries[name]["data_offsets"][0] for name in self._names}

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the file's dtype and shape.

        Raises:
            PtqError: If there is none of this name.
        """
        if name not in self.header:
            raise PtqError(f"{self.path.name}: tensor {name} is missing")
        dtype, shape = self.header[name]
        if dtype not in _DTYPES:
            raise PtqError(f"{self.path.name}: tensor {name} has data type {dtype}, which torch cannot hold")
        values = torch.empty(shape, dtype=_DTYPES[dtype])
        if values.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._offsets[name])
                _fill(values.reshape(-1).view(torch.uint8).numpy().data, file, self.path)
        return values

    def has_only_finite(self, name: str) -> bool:
        """Whether a tensor of floating-point numbers has neither NaN nor infinity; it is read in pieces.

        Raises:
            PtqError: If there is none of this name, or it holds other numbers.
        """
        if name not in self.header:
            raise PtqError(f"{self.path.name}: tensor {name} is missing")
        dtype, shape = self.header[name]
        if dtype not in _INFINITY:
            raise PtqError(f"{self.path.name}: tensor {name} has data type {dtype}, which has no infinity")
        infinity = _INFINITY[dtype]
        left = math.prod(shape)
        piece = np.empty(min(left, _READ_AT_ONCE // infinity.itemsize), infinity.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._offsets[name])
            while left:
                values = piece[:left]
                _fill(values.view(np.uint8).data, file, self.path)
                # All bits but the sign: those of numbers are less than those of infinity, those of NaN are more.
                values &= np.iinfo(values.dtype).max >> 1
                if values.max() >= infinity:
                    return False
                left -= len(values)
        return True


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
            tensors = torch.load(check_saved_file(self.path), map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, FileError) as error:
            reason = error.reason if isinstance(error, FileError) else str(error).partition("\n")[0]
            raise PtqError(f"{self.path.name}: not readable as tensors: {reason}") from error
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

    def has_only_finite(self, name: str) -> bool:
        """Whether a tensor has neither NaN nor infinity."""
        if name not in self.header:
            raise PtqError(f"{self.path.name}: tensor {name} is missing")
        return bool(self._tensors[name].isfinite().all())


def _fill(values: memoryview, file: io.FileIO, path: Path) -> None:
    """Reads as many bytes as there is room for: the system gives at most 2 GiB at a time."""
    filled = 0
    while filled < len(values):
        count = file.readinto(values[filled:])
        if not count:
            raise PtqError(f"{path.name} ends too early: copy or make it again")
        filled += count


def open_tensors(path: Path) -> TensorFile | TorchFile:
    """Opens a file by the end of its name."""
    return TensorFile(path) if path.suffix == ".safetensors" else TorchFile(path)
