# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The index of a NeMo 2.0 checkpoint's weights: which tensors there are, and where their chunks lie. Needs no torch."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nemo_ptq.errors import ConfigError
from nemo_ptq.untrusted import FileError, inside, open_file, read_json_object

# Characters of an error that a message shows.
_SHOWN = 200
# Parts of a tensor without values, each of which would be listed.
_MOST_EMPTY = 2**20


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor that was saved in one piece, or an object that is no tensor.

    Attributes:
        name: Of the tensor or the object.
        offsets: Where it begins, along each axis of the tensor.
        sizes: How long it is along each of them.
        file: Name of its file in `weights/`.
        start: First byte there.
        length: How many bytes.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint.

    Attributes:
        shape: Of the whole tensor, stacked axes included.
        dtype: Name of its data type, e.g. "bfloat16".
        chunks: What it is made of.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


class _Record:
    """Stands for any class or function in a pickle: keeps its state, runs nothing."""

    state: Any = None

    def __new__(cls, *args: Any) -> "_Record":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickle's data and imports none of the names in it, so that a hostile checkpoint can run no code."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            # A data type is a name alone, a size a call.
            return tuple if name == "Size" else _TorchName(name)
        return _Record


class _TorchName(str):
    """A name of torch's: a data type, or a function that a pickle would call."""

    def __call__(self, *args: Any) -> _Record:
        return _Record()


def read_index(checkpoint: Path) -> Any:
    """Reads `weights/.metadata`, a pickled torch.distributed.checkpoint.metadata.Metadata.

    Args:
        checkpoint: Directory with `weights/`.

    Returns:
        What has the attributes of that class, and of those inside it.

    Raises:
        ConfigError: If it cannot be read, or the weights are in another format.
    """
    backend_file = checkpoint / "weights" / "metadata.json"
    index_file = checkpoint / "weights" / ".metadata"
    try:
        backend = read_json_object(backend_file)["sharded_backend"]
    except (FileError, KeyError) as error:
        raise ConfigError([_unreadable(backend_file, error)]) from error
    if backend != "torch_dist":
        raise ConfigError([f"{checkpoint}: weights are in {backend} format: save them in torch_dist format with NeMo"])
    try:
        with open_file(index_file) as file:
            index = _InertUnpickler(file).load()
        for name, entry in index.state_dict_metadata.items():
            _check_entry(name, entry)
        for place in index.storage_data.values():
            _check_place(checkpoint / "weights", place)
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ConfigError([_unreadable(index_file, error)]) from error
    return index


def _unreadable(file: Path, error: Exception) -> str:
    reason = error.reason if isinstance(error, FileError) else repr(error)[:_SHOWN]
    return f"{file} cannot be read ({reason}): copy or save the checkpoint again"


def _check_entry(name: Any, entry: Any) -> None:
    """Raises where a tensor's sizes cannot be what they are called: much is counted by them."""
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no name")
    if not hasattr(entry, "size"):
        return
    boxes = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    axes = [*entry.size, *(number for box in boxes for numbers in box for number in numbers)]
    if not all(type(number) is int and 0 <= number < 2**62 for number in axes):
        raise ValueError(f"{name} has sizes that are no whole numbers")
    if any(len(numbers) != len(entry.size) for box in boxes for numbers in box):
        raise ValueError(f"{name} has chunks of other axes than its own")
    if prod(entry.size) > sum(prod(sizes) for _, sizes in boxes):
        raise ValueError(f"{name} is larger than its chunks")
    if prod(max(axis, 1) for axis in entry.size) > _MOST_EMPTY and 0 in entry.size:
        raise ValueError(f"{name} is empty, and has an axis of {max(entry.size)}")
    if not isinstance(entry.properties.state[0], _TorchName):
        raise TypeError(f"{name} has no data type")


def _check_place(weights: Path, place: Any) -> None:
    numbers = (place.offset, place.length)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{place.relative_path!r} holds nothing at {numbers}")
    inside(weights, place.relative_path)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint's weights are made of, by name.

    Attributes:
        tensors: The tensors.
        objects: Everything else, such as the `_extra_state` of modules; boxes without axes.
    """

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Chunk]


def read_stored(checkpoint: Path) -> Stored:
    """Reads where a checkpoint's tensors and other objects lie.

    Raises:
        ConfigError: If its index cannot be read.
    """
    index = read_index(checkpoint)
    places = {(place.fqn, getattr(place, "offset", None)): info for place, info in index.storage_data.items()}

    def chunk(name: str, offsets: tuple[int, ...] | None, sizes: tuple[int, ...]) -> Chunk:
        info = places.get((name, offsets))
        if info is None or info.length < prod(sizes if offsets is not None else ()):
            file = checkpoint / "weights" / ".metadata"
            raise ConfigError([f"{file} lacks a place for all of {name}: copy or save the checkpoint again"])
        return Chunk(name, offsets or (), sizes, info.relative_path, info.offset, info.length)

    tensors, objects = {}, {}
    for name, entry in index.state_dict_metadata.items():
        if hasattr(entry, "size"):
            chunks = tuple(chunk(name, box.offsets, box.sizes) for box in entry.chunks)
            tensors[name] = StoredTensor(entry.size, str(entry.properties.state[0]), chunks)
        else:
            objects[name] = chunk(name, None, ())
    return Stored(tensors, objects)
