# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The index of a NeMo 2.0 checkpoint's weights: which tensors there are, and where their chunks lie. Needs no torch."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_ptq.errors import ConfigError


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
        backend = json.loads(backend_file.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError([f"{backend_file} cannot be read ({error!r}): copy or save the checkpoint again"]) from error
    if backend != "torch_dist":
        raise ConfigError([f"{checkpoint}: weights are in {backend} format: save them in torch_dist format with NeMo"])
    try:
        with index_file.open("rb") as file:
            index = _InertUnpickler(file).load()
        index.state_dict_metadata.items(), index.storage_data.values()
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise ConfigError([f"{index_file} cannot be read ({error!r}): copy or save the checkpoint again"]) from error
    return index


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
        info = places[name, offsets]
        return Chunk(name, offsets or (), sizes, info.relative_path, info.offset, info.length)

    tensors, objects = {}, {}
    for name, entry in index.state_dict_metadata.items():
        if hasattr(entry, "size"):
            chunks = tuple(chunk(name, box.offsets, box.sizes) for box in entry.chunks)
            tensors[name] = StoredTensor(entry.size, str(entry.properties.state[0]), chunks)
        else:
            objects[name] = chunk(name, None, ())
    return Stored(tensors, objects)
