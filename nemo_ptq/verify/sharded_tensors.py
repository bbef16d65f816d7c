# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of torch's distributed checkpoint format, read one by one and without running anything in the files."""

import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from nemo_ptq.errors import PtqError

_STATE = "._extra_state"


class ShardedTensors:
    """A directory of the format: an index, and files in which each chunk of a tensor lies as ``torch.save`` wrote it.

    All methods raise PtqError where a file is damaged, or lacks what they are asked for.

    Args:
        directory: It.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def _index(self) -> Metadata:
        try:
            return FileSystemReader(self._directory).read_metadata()
        except Exception as error:  # a damaged pickle raises whatever it likes
            raise PtqError(f"{self._directory / '.metadata'} cannot be read: {error}") from error

    @cached_property
    def _states(self) -> Mapping[str, str]:
        """The full name of each module's state, which ends in the number of its shard."""
        return {name.partition(_STATE)[0]: name for name in self._index.state_dict_metadata if _STATE in name}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is none of that name."""
        stored = self._index.state_dict_metadata.get(name)
        return tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None

    def read(self, name: str, position: tuple[int, ...] = ()) -> torch.Tensor:
        """Reads a part of a tensor.

        Args:
            name: Its name.
            position: Index of the part along the leading dimensions, such as (layer,) or (layer, expert).
        """
        stored, stacked = self._stored(name), len(position)
        part = torch.empty(stored.size[stacked:], dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            bounds = list(zip(chunk.offsets, chunk.sizes, strict=True))
            if all(start <= at < start + size for at, (start, size) in zip(position, bounds, strict=False)):
                whole = self._load(MetadataIndex(name, chunk.offsets))
                piece = whole[tuple(at - start for at, (start, _) in zip(position, bounds, strict=False))]
                part[tuple(slice(start, start + size) for start, size in bounds[stacked:])] = piece
        return part

    def pieces(self, name: str) -> list[torch.Tensor]:
        """Reads a tensor in the pieces that the ranks have written, in the order of their places."""
        offsets = sorted(chunk.offsets for chunk in self._stored(name).chunks)
        return [self._load(MetadataIndex(name, offset)) for offset in offsets]

    def extra_state(self, module: str) -> Mapping[str, Any]:
        """Reads what a module has stored beside its tensors; empty where it has stored nothing."""
        if module not in self._states:
            return {}
        name = self._states[module]
        (content,) = self._load(MetadataIndex(name))
        if not len(content):
            return {}
        try:
            return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
        except Exception as error:
            raise PtqError(f"{name} cannot be read: {error}") from error

    def _stored(self, name: str) -> TensorStorageMetadata:
        stored = self._index.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise PtqError(f"{self._directory} holds no tensor {name}")
        return stored

    def _load(self, index: MetadataIndex) -> Any:
        place = self._index.storage_data[index]
        try:
            with (self._directory / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        except Exception as error:
            raise PtqError(f"{self._directory / place.relative_path}: {index.fqn} cannot be read: {error}") from error
