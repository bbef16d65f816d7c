# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a NeMo 2.0 checkpoint, read one by one and without running anything in the files.

``weights/.metadata`` is a pickle of torch.distributed.checkpoint's: for each tensor its shape, its data type and the
boxes that it was saved in, and for each box the file, the first byte and the length of what ``torch.save`` made of it.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import FileError, inside, open_file, read_json_object
from nemo_ptq.untrusted_pickles import DataUnpickler, check_saved, size

_BACKEND = "torch_dist"
_STATE = "._extra_state"


class _Plain:
    """Stands for an object of any class: holds what was stored of it."""

    def __init__(self, *arguments: Any) -> None:
        self.stored: Any = arguments

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # of a container of a class of its own, whose content is not kept

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__ = state  # not a copy: a pickle can name one large state many times
        else:
            self.stored = state


class PlainUnpickler(DataUnpickler):
    """Imports nothing: sizes become tuples, data types themselves, and every other class :class:`_Plain`."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name."""
        if (module, name) == ("torch", "Size"):
            return size
        value = getattr(torch, name, None) if module == "torch" else None
        return value if isinstance(value, torch.dtype) else _Plain

    def persistent_load(self, pid: Any) -> Any:
        """Returns what stands for the values of a tensor."""
        return _Plain(pid)


@dataclass(frozen=True)
class _Piece:
    """A piece that was saved at once: a box of a tensor, or an object without axes."""

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    first_byte: int
    length: int


@dataclass(frozen=True)
class _Entry:
    """A tensor, or where there is no data type an object."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    pieces: tuple[_Piece, ...]


def _read_index(weights: Path) -> dict[str, _Entry]:
    try:
        backend = read_json_object(weights / "metadata.json")["sharded_backend"]
    except FileError as error:
        raise PtqError(f"{error}: copy the checkpoint again") from error
    except KeyError as error:
        raise PtqError(f"{weights / 'metadata.json'} lacks {error}: copy the checkpoint again") from error
    if backend != _BACKEND:
        raise PtqError(f"{weights} is in format {backend}, expected {_BACKEND}: save it again with NeMo")
    try:
        with open_file(weights / ".metadata") as file:
            index = PlainUnpickler(file).load()
        places: dict[tuple[str, tuple[int, ...]], Any] = {
            (key.fqn, getattr(key, "offset", None) or ()): place for key, place in index.storage_data.items()
        }

        def piece(name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> _Piece:
            place = places[name, start]
            if place.length < prod(shape):
                raise ValueError(f"{name} is larger than what is stored of it")
            return _Piece(name, start, shape, place.relative_path, place.offset, place.length)

        entries = {}
        for name, stored in index.state_dict_metadata.items():
            if hasattr(stored, "size"):
                pieces = tuple(piece(name, box.offsets, box.sizes) for box in stored.chunks)
                if prod(stored.size) > sum(prod(box.sizes) for box in stored.chunks):
                    raise ValueError(f"{name} is larger than its chunks")
                entries[name] = _Entry(stored.size, stored.properties.stored[0], pieces)
            else:
                entries[name] = _Entry((), None, (piece(name, (), ()),))
        return entries
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise PtqError(f"{weights / '.metadata'} cannot be read: {error!r}") from error


class ShardedTensors:
    """The weights of a checkpoint.

    All methods raise PtqError where a file is damaged, or lacks what they are asked for.

    Args:
        checkpoint: Directory with ``weights/``.
        weights: The directory with the files, where it is another one.
        prefix: Added before the names in the files.
    """

    def __init__(self, checkpoint: Path, weights: Path | None = None, prefix: str = "") -> None:
        self._weights, self._prefix = weights or checkpoint / "weights", prefix

    @cached_property
    def _entries(self) -> Mapping[str, _Entry]:
        return {self._prefix + name: entry for name, entry in _read_index(self._weights).items()}

    @cached_property
    def _states(self) -> Mapping[str, str]:
        """The full name of each module's state, which ends in the number of its shard."""
        objects = (name for name, entry in self._entries.items() if entry.dtype is None)
        return {name.partition(_STATE)[0]: name for name in objects if _STATE in name}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of everything that is stored, by name; of what is no tensor, ()."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def file_problems(self) -> list[str]:
        """Files that are missing, or shorter than the index says."""
        needed: dict[str, int] = {}
        for entry in self._entries.values():
            for piece in entry.pieces:
                needed[piece.file] = max(needed.get(piece.file, 0), piece.first_byte + piece.length)
        problems = []
        for name, length in sorted(needed.items()):
            path = self._weights / name
            if not path.is_file():
                problems.append(f"{self._weights.name}/ lacks {name}")
            elif path.stat().st_size < length:
                size = path.stat().st_size
                problems.append(f"{self._weights.name}/{name} is {size} bytes long, its tensors end at {length}")
        return problems

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is none of that name."""
        entry = self._entries.get(name)
        return None if entry is None or entry.dtype is None else entry.shape

    def read(self, name: str, position: tuple[int, ...] = ()) -> torch.Tensor:
        """Reads a part of a tensor.

        Args:
            name: Name of the tensor.
            position: Index of the part along the leading dimensions, such as (layer,) or (layer, expert).
        """
        entry, axes = self._tensor(name), len(position)
        part = torch.empty(entry.shape[axes:], dtype=entry.dtype)
        missing = part.numel()
        for piece in entry.pieces:
            inside = tuple(index - first for index, first in zip(position, piece.start, strict=False))
            if any(index < 0 or index >= size for index, size in zip(inside, piece.shape, strict=False)):
                continue
            values = self._load(piece)[inside]
            if values.shape == part.shape:
                return values
            box = zip(piece.start[axes:], values.shape, strict=True)
            part[tuple(slice(first, first + size) for first, size in box)] = values
            missing -= values.numel()
        if missing:
            raise PtqError(f"{self._weights}: {missing} of {part.numel()} values of {name} are stored nowhere")
        return part

    def pieces(self, name: str) -> list[torch.Tensor]:
        """Reads a tensor in the pieces that the ranks have written, in the order of their places."""
        return [self._load(piece) for piece in sorted(self._tensor(name).pieces, key=lambda piece: piece.start)]

    def extra_state(self, module: str) -> Mapping[str, Any]:
        """Reads what a module has stored beside its tensors; empty where it has stored nothing."""
        if module not in self._states:
            return {}
        name = self._states[module]
        (content,) = self._load(self._entries[name].pieces[0])
        if content is None or not len(content):
            return {}
        try:
            return _loaded(content.numpy().tobytes())
        except Exception as error:
            raise PtqError(f"{name} cannot be read: {error}") from error

    def stored_bytes(self, name: str) -> bytes:
        """Reads what is stored under a name that is no tensor's, as ``torch.save`` has written it."""
        entry = self._entries.get(name)
        if entry is None or entry.dtype is not None:
            raise PtqError(f"{self._weights} holds no object {name}")
        (piece,) = entry.pieces
        with open_file(inside(self._weights, piece.file)) as file:
            file.seek(piece.first_byte)
            return file.read(piece.length)

    def _tensor(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None or entry.dtype is None:
            raise PtqError(f"{self._weights} holds no tensor {name}")
        return entry

    def _load(self, piece: _Piece) -> Any:
        path = inside(self._weights, piece.file)
        try:
            with open_file(path) as file:
                file.seek(piece.first_byte)
                return _loaded(file.read(piece.length))
        except Exception as error:  # damaged bytes raise whatever they like
            raise PtqError(f"{path}: {piece.name} cannot be read: {error}") from error


def _loaded(content: bytes) -> Any:
    """Loads an archive of ``torch.save``."""
    check_saved(io.BytesIO(content), len(content))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
