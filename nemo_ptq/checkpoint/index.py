# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The index of a checkpoint's torch_dist files: which tensors there are, and where their chunks lie. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.inert import InertUnpickler, TorchName
from nemo_ptq.errors import ConfigError
from nemo_ptq.untrusted import FileError, inside, open_file, read_json_object

# Characters of an error that a message shows.
_SHOWN = 200
# The most parts of a tensor with an empty axis, since each part would be listed.
_MOST_EMPTY = 2**20


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor that was saved in one piece, or an object that is no tensor.

    Attributes:
        name: Name of the tensor or the object.
        offsets: Its beginning along each axis of the tensor.
        sizes: Its length along each axis.
        file: Name of its file beside the index.
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
        shape: Shape of the whole tensor, stacked axes included.
        dtype: Name of its data type, e.g. "bfloat16".
        chunks: The chunks that it is made of.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


def weights_of(checkpoint: Path) -> Path:
    """Returns where the torch_dist files of a checkpoint are: NeMo has them in ``weights/``, Megatron-LM at the top."""
    weights = checkpoint / "weights"
    return weights if weights.is_dir() else checkpoint


def read_index(checkpoint: Path) -> Any:
    """Reads `.metadata`, a pickled torch.distributed.checkpoint.metadata.Metadata.

    Args:
        checkpoint: Directory with `weights/`, or with the files themselves.

    Returns:
        An object with the attributes of that class, and of the classes inside it.

    Raises:
        ConfigError: If it cannot be read, or the weights are in another format.
    """
    weights = weights_of(checkpoint)
    backend_file, index_file = weights / "metadata.json", weights / ".metadata"
    try:
        backend = read_json_object(backend_file)["sharded_backend"]
    except (FileError, KeyError) as error:
        raise ConfigError([_unreadable(backend_file, error)]) from error
    if backend != "torch_dist":
        raise ConfigError([f"{checkpoint}: weights are in {backend} format: save them in torch_dist format"])
    try:
        with open_file(index_file) as file:
            index = InertUnpickler(file).load()
        for name, entry in index.state_dict_metadata.items():
            _check_entry(name, entry)
        for place in index.storage_data.values():
            _check_place(weights, place)
    except Exception as error:  # a damaged pickle raises any kind of error
        raise ConfigError([_unreadable(index_file, error)]) from error
    return index


def _unreadable(file: Path, error: Exception) -> str:
    reason = error.reason if isinstance(error, FileError) else repr(error)[:_SHOWN]
    return f"{file} cannot be read ({reason}): copy or save the checkpoint again"


def _check_entry(name: Any, entry: Any) -> None:
    """Raises if a tensor's sizes are impossible: much is computed from them."""
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
    if not isinstance(entry.properties.state[0], TorchName):
        raise TypeError(f"{name} has no data type")


def _check_place(weights: Path, place: Any) -> None:
    numbers = (place.offset, place.length)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{place.relative_path!r} holds nothing at {numbers}")
    inside(weights, place.relative_path)


@dataclass(frozen=True)
class Stored:
    """The contents of a checkpoint's weights, by name.

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
            file = weights_of(checkpoint) / ".metadata"
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
