# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The weights of a torch_dist checkpoint, read from its files layer by layer: without Megatron, and without a model.

Format: Megatron's torch_dist, that is torch.distributed.checkpoint with a file for each writer, in which every chunk is
a tensor written by ``torch.save``.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any
from zipfile import BadZipFile, ZipFile, ZipInfo
from zlib import crc32

import torch

from nemo_ptq.checkpoint.index import Chunk, StoredTensor, read_stored, weights_of
from nemo_ptq.checkpoint.known_tensors import is_weight, prefix_of
from nemo_ptq.checkpoint.parts import TensorPart, check_finite
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import open_unbuffered
from nemo_ptq.untrusted_pickles import check_saved

# The records with the bytes of tensors.
_STORAGE = re.compile(r"/data/\d+$")
_EXPERTS = ".experts.experts."
# The ends of the names of groups that form one tensor of a model: of gated layers, and of the projection and the
# convolution of a state space; the convolution has no "z" and "dt".
_ROWS = (("_w", "_v"), (".z", ".x", ".B", ".C", ".dt"))


def checkpoint_parts(checkpoint: Path) -> list[TensorPart]:
    """Returns every part of every tensor of a checkpoint's model; none is read yet.

    Args:
        checkpoint: Directory with ``weights/``, or with the files themselves, as Megatron-LM writes them.

    Raises:
        PtqError: If its index cannot be read.
    """
    prefix, weights = prefix_of(checkpoint), weights_of(checkpoint)
    parts = [
        part
        for name, tensor in read_stored(checkpoint).tensors.items()
        if is_weight(name, prefix)
        for part in _parts(weights, prefix, name.removeprefix(prefix), tensor)
    ]
    return list(_with_rows_joined(parts))


def _with_rows_joined(parts: Sequence[TensorPart]) -> Iterator[TensorPart]:
    """Joins groups of rows that checkpoints with a name for each layer keep apart, in the order of :data:`_ROWS`."""
    by_key = {part.key: part for part in parts}
    joined: set[str] = set()
    for part in parts:
        key, suffixes = _group_of(part.key)
        found = [by_key[key + suffix] for suffix in suffixes if key + suffix in by_key]
        if len(found) < 2:
            yield part
        elif key not in joined:
            joined.add(key)
            yield _joined(key, found)


def _group_of(key: str) -> tuple[str, Sequence[str]]:
    """The tensor of which this one is a group of rows, and the ends of all groups' names; none where it is whole."""
    for suffixes in _ROWS:
        for suffix in suffixes:
            if key.endswith((f".weight{suffix}", f".bias{suffix}")):
                return key.removesuffix(suffix), suffixes
    return key, ()


def _joined(key: str, groups: Sequence[TensorPart]) -> TensorPart:
    rows = sum(part.shape[0] for part in groups)
    return replace(
        groups[0],
        key=key,
        shape=(rows, *groups[0].shape[1:]),
        read=lambda: torch.cat([part.read() for part in groups]),
    )


def _parts(weights: Path, prefix: str, key: str, tensor: StoredTensor) -> Sequence[TensorPart]:
    stacked = 0
    if re.match(r"decoder\.layers\.\D", key):
        stacked = 2 if _EXPERTS in key else 1
    sizes, shape, dtype = tensor.shape[:stacked], tensor.shape[stacked:], _dtype(tensor)
    return [
        TensorPart(
            key,
            shape,
            dtype,
            partial(_read_weight, prefix + key, weights, tensor, index),
            tuple(zip(index, sizes, strict=True)),
        )
        for index in product(*map(range, sizes))
    ]


def _dtype(tensor: StoredTensor) -> torch.dtype:
    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise PtqError(f"a tensor of the checkpoint is of {tensor.dtype}, which torch does not have: save it again")
    return dtype


def _read_weight(name: str, weights: Path, tensor: StoredTensor, index: tuple[int, ...]) -> torch.Tensor:
    part = read_part(weights, tensor, index)
    check_finite(name, part)
    return part


def read_part(weights: Path, tensor: StoredTensor, index: tuple[int, ...] = ()) -> torch.Tensor:
    """Puts one part of a tensor together: the slice at ``index`` along the first axes.

    Args:
        weights: The directory that its chunks' files are in.
        tensor: The tensor.
        index: Index of the part, such as (layer,) or (layer, expert).

    Raises:
        PtqError: If files are damaged, or values missing.
    """
    whole, filled = torch.empty(tensor.shape[len(index) :], dtype=_dtype(tensor)), 0
    for chunk in tensor.chunks:
        inside = [place - start for place, start in zip(index, chunk.offsets, strict=False)]
        if all(0 <= place < size for place, size in zip(inside, chunk.sizes, strict=False)):
            piece = read_chunk(weights, chunk)[tuple(inside)]
            if piece.shape == whole.shape:
                return piece
            begin = chunk.offsets[len(index) :]
            whole[tuple(slice(at, at + size) for at, size in zip(begin, piece.shape, strict=True))] = piece
            filled += piece.numel()
    if filled != whole.numel():
        raise PtqError(f"{weights} holds {filled} of the {whole.numel()} values of a tensor: copy or save it again")
    return whole


def read_box(
    weights: Path, tensor: StoredTensor, offsets: Sequence[int], sizes: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Puts a box of a tensor together.

    Args:
        weights: The directory that its chunks' files are in.
        tensor: The tensor.
        offsets: The box's beginning along each axis.
        sizes: The box's length along each axis.
        device: Where the result goes.

    Raises:
        PtqError: If files are damaged, or values missing.
    """
    box, filled = torch.empty(tuple(sizes), dtype=_dtype(tensor), device=device), 0
    for chunk in tensor.chunks:
        spans = [
            (max(start, begin), min(start + length, begin + size))
            for start, length, begin, size in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
        ]
        if all(low < high for low, high in spans):
            inner = tuple(slice(low - at, high - at) for (low, high), at in zip(spans, chunk.offsets, strict=True))
            piece = read_chunk(weights, chunk)[inner]
            box[tuple(slice(low - at, high - at) for (low, high), at in zip(spans, offsets, strict=True))] = piece
            filled += piece.numel()
    if filled != box.numel():
        raise PtqError(f"{weights} holds {filled} of the {box.numel()} values of a tensor: copy or save it again")
    return box


class _Window(io.RawIOBase):
    """A part of a file as a file: torch reads a tensor from it into its place, without a copy of the bytes.

    Args:
        file: Unbuffered.
        start: Where the part begins.
        length: Its bytes.
    """

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._position))
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self._position += count
        return count


def read_chunk(weights: Path, chunk: Chunk) -> Any:
    """Reads a chunk, without running anything that the file names.

    Raises:
        PtqError: If the file is missing or damaged.
    """
    try:
        with open_unbuffered(weights / chunk.file) as file:
            window = io.BufferedReader(_Window(file, chunk.start, chunk.length))
            records = check_saved(window, chunk.length)
            storages = _check_records(window, records)
            window.seek(0)
            value = torch.load(window, map_location="cpu", weights_only=True)
            if isinstance(value, torch.Tensor):
                _check_storage(value, storages)
            return value
    except Exception as error:  # damaged bytes raise any kind of error
        # torch's own message advises running the code that the file names.
        reason = "not a tensor" if isinstance(error, UnpicklingError) else str(error).partition("\n")[0]
        raise PtqError(
            f"{weights / chunk.file}: {chunk.name} cannot be read ({reason}): copy or save the checkpoint again"
        ) from error


def _check_records(file: IO[bytes], records: Sequence[ZipInfo]) -> list[ZipInfo]:
    """Compares the records of a zip archive that torch has written with their CRC-32, which torch does not check.

    Returns:
        The records with the bytes of tensors, which are not read here: :func:`_check_storage` compares them.

    Raises:
        BadZipFile: If a record differs.
    """
    if not any(record.CRC for record in records):
        return []  # written after torch.serialization.set_crc32_options(False)
    storages = [record for record in records if _STORAGE.search(record.filename)]
    with ZipFile(file) as archive:
        for record in records:
            if record not in storages:
                archive.read(record)
        return storages


def _check_storage(tensor: torch.Tensor, storages: Sequence[ZipInfo]) -> None:
    """Compares a tensor's bytes, which are in memory, with the CRC-32 of the record that they were read from."""
    content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    if any(crc32(content.data) != record.CRC for record in storages):
        raise BadZipFile("its bytes have another CRC-32 than when they were written")
