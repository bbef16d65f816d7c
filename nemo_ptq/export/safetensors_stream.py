# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A safetensors file written tensor by tensor, in any order, without ever holding it in memory.

Format: https://github.com/huggingface/safetensors#format. The header, and so every offset, is known from names, dtypes
and shapes alone; the bytes equal those of ``safetensors.torch.save_file``.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from nemo_ptq.export.manifest_writer import checksum_of
from nemo_ptq.export.safetensors_header import lay_out

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file will hold.

    Attributes:
        name: Name in the file.
        dtype: Data type.
        shape: Shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsStream:
    """Writes one file, in a thread of its own; use it in a ``with`` block.

    What goes wrong while the thread writes is raised by the next :meth:`wait`.

    Args:
        path: The file to make; it must not exist.
        specs: Every tensor that it will hold.
        metadata: Free-form entries for the header.
        resume: Continue the file that is there: what is in it stays until it is written again.

    Raises:
        OSError: If it cannot be made.
        ValueError: On leaving the block without an error, if a tensor was not written.
    """

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None, resume: bool = False
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        header, self._offsets, size = lay_out(
            {name: (_DTYPES[spec.dtype], spec.shape) for name, spec in self._specs.items()}, metadata or {}
        )
        self._path, self._missing = path, set(self._specs)
        self._file = path.open("r+b" if resume else "xb", buffering=0)
        self._thread = ThreadPoolExecutor(1)
        # Claims the space now: a full disk is better found out before the first layer than at the last. In memory's
        # file system that takes as long as writing does.
        self._begun: list[Future[None]] = [self._thread.submit(self._begin, header, size)]

    def _begin(self, header: bytes, size: int) -> None:
        _write_at(self._file.fileno(), 0, memoryview(header))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, size)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Begins to write one tensor.

        Args:
            name: The tensor's name.
            tensor: On the CPU, with the dtype and shape that were announced. It must stay as it is until :meth:`wait`.

        Raises:
            ValueError: If it is not what was announced.
        """
        spec = self._specs[name]
        if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise ValueError(
                f"{name} was announced as {spec.dtype} {spec.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._begun.append(self._thread.submit(_write_at, self._file.fileno(), self._offsets[name], data))
        self._missing.discard(name)

    def skip(self, name: str) -> None:
        """Takes a tensor for written: an earlier process has done it."""
        self._missing.discard(name)

    @property
    def is_complete(self) -> bool:
        """Whether every tensor has been given, or skipped."""
        return not self._missing

    def checksum(self) -> "Future[str]":
        """Begins to read the file for its checksum, behind what is being written; it must be complete."""
        return self._thread.submit(checksum_of, self._path)

    def wait(self) -> None:
        """Returns when everything is written that :meth:`write` was given.

        Raises:
            OSError: If something could not be written.
        """
        begun, self._begun = self._begun, []
        for writing in begun:
            writing.result()

    def sync(self) -> None:
        """Has the operating system put what is written on the disk.

        Raises:
            OSError: If something could not be written.
        """
        self.wait()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "SafetensorsStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.sync()
        finally:
            self._thread.shutdown()  # what it was given is written, whatever ended the block
            self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"tensors that were announced but not written: {', '.join(sorted(self._missing))}")


def _write_at(file: int, offset: int, data: memoryview) -> None:
    """Writes bytes at a place of a file: the system takes at most 2 GiB at a time."""
    while len(data):
        written = os.pwrite(file, data, offset)
        offset, data = offset + written, data[written:]
