# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a NeMo 2.0 checkpoint, or a Hugging Face directory that is imported as it is read."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import fiddle as fdl
from nemo.lightning import io

from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel
from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.checkpoint.parts import TensorPart, WeightsSize
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.errors import PtqError

EMBEDDING_KEY = "embedding.word_embeddings.weight"


class CheckpointReader(Protocol):
    """A model that can be built anywhere, and read part by part."""

    @property
    def parts(self) -> Sequence[TensorPart]:
        """Every part of every tensor; none is read yet."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, with the padding that it has at every tensor parallelism."""

    @property
    def size(self) -> WeightsSize:
        """What the whole model takes, optimizer states left out."""

    def model_config(self) -> AbstractContextManager[fdl.Config]:
        """Gives, within a ``with`` block, the fiddle config of NeMo's model and tokenizer, free to be changed."""

    def write_context(self, directory: Path) -> None:
        """Makes the ``context/`` directory of a NeMo checkpoint."""


class NemoCheckpoint:
    """A NeMo 2.0 checkpoint.

    Args:
        path: Directory with ``context/`` and ``weights/``.

    Raises:
        PtqError: If it is not the checkpoint of a GPT-like model.
    """

    def __init__(self, path: Path) -> None:
        self._context = path / "context"
        self.parts = checkpoint_parts(path)
        embedding = next((part for part in self.parts if part.key == EMBEDDING_KEY), None)
        if embedding is None:
            raise PtqError(f"{path} holds no {EMBEDDING_KEY}: it is not the checkpoint of a GPT-like model")
        self.size = WeightsSize.of((part.shape, part.dtype) for part in self.parts)
        self.vocab_size: int = embedding.shape[0]

    @contextmanager
    def model_config(self) -> Iterator[fdl.Config]:
        """See :meth:`CheckpointReader.model_config`."""
        yield io.load_context(self._context, subpath="model", build=False)

    def write_context(self, directory: Path) -> None:
        """See :meth:`CheckpointReader.write_context`."""
        shutil.copytree(self._context, directory)


def open_checkpoint(path: Path) -> CheckpointReader:
    """Opens a NeMo 2.0 checkpoint, or a Hugging Face directory. Nothing but metadata is read yet.

    Raises:
        PtqError: If it is neither, or what it holds cannot become a NeMo model.
    """
    return HuggingFaceModel(path) if is_hugging_face(path) else NemoCheckpoint(path)
