# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a NeMo 2.0 checkpoint, read one by one and without running anything in the files."""

import io
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.checkpoint.index import Stored, StoredTensor, read_stored
from nemo_ptq.checkpoint.torch_dist import read_chunk, read_part
from nemo_ptq.errors import PtqError

_STATE = "._extra_state"


class ShardedTensors:
    """The weights of a checkpoint.

    All methods raise PtqError where a file is damaged, or lacks what they are asked for.

    Args:
        checkpoint: Directory with ``weights/``.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint, self._weights = checkpoint, checkpoint / "weights"

    @cached_property
    def _stored(self) -> Stored:
        return read_stored(self._checkpoint)

    @cached_property
    def _states(self) -> Mapping[str, str]:
        """The full name of each module's state, which ends in the number of its shard."""
        return {name.partition(_STATE)[0]: name for name in self._stored.objects if _STATE in name}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is none of that name."""
        stored = self._stored.tensors.get(name)
        return None if stored is None else stored.shape

    def read(self, name: str, position: tuple[int, ...] = ()) -> torch.Tensor:
        """Reads a part of a tensor.

        Args:
            name: Its name.
            position: Index of the part along the leading dimensions, such as (layer,) or (layer, expert).
        """
        return read_part(self._weights, self._tensor(name), position)

    def pieces(self, name: str) -> list[torch.Tensor]:
        """Reads a tensor in the pieces that the ranks have written, in the order of their places."""
        chunks = sorted(self._tensor(name).chunks, key=lambda chunk: chunk.offsets)
        return [read_chunk(self._weights, chunk) for chunk in chunks]

    def extra_state(self, module: str) -> Mapping[str, Any]:
        """Reads what a module has stored beside its tensors; empty where it has stored nothing."""
        if module not in self._states:
            return {}
        name = self._states[module]
        (content,) = read_chunk(self._weights, self._stored.objects[name])
        if not len(content):
            return {}
        try:
            return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)
        except Exception as error:
            raise PtqError(f"{name} cannot be read: {error}") from error

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._stored.tensors:
            raise PtqError(f"{self._weights} holds no tensor {name}")
        return self._stored.tensors[name]
