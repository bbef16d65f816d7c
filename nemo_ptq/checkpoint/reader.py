# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a NeMo 2.0 checkpoint, or a Hugging Face or Megatron-LM one, converted as it is read."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from nemo_ptq.checkpoint.adapters.adapter import read_adapter
from nemo_ptq.checkpoint.adapters.merging import merged_parts
from nemo_ptq.checkpoint.adapters.nemo_adapter import NemoAdapter
from nemo_ptq.checkpoint.adapters.peft_adapter import PeftAdapter
from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.context_graph import Call
from nemo_ptq.checkpoint.megatron.directories import is_megatron
from nemo_ptq.checkpoint.metadata import is_hugging_face, read_model
from nemo_ptq.checkpoint.model_fields import ModelFields, fields_in_context
from nemo_ptq.checkpoint.parts import TensorPart, WeightsSize
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.errors import PtqError

EMBEDDING_KEY = "embedding.word_embeddings.weight"


class CheckpointReader(Protocol):
    """A model that can be built anywhere, and read part by part."""

    parts: list[TensorPart]
    """Every part of every tensor; none is read yet."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, with the padding that it has at every tensor parallelism."""

    @property
    def size(self) -> WeightsSize:
        """Size of the whole model, without optimizer states."""

    @property
    def fields(self) -> ModelFields | None:
        """The fields that the model is built from; None where only NeMo's own classes can build it."""

    def model_config(self) -> AbstractContextManager[Any]:
        """Gives, within a ``with`` block, the fiddle config of NeMo's model and tokenizer, free to be changed."""


class NemoCheckpoint:
    """A NeMo 2.0 checkpoint.

    Args:
        path: Directory with ``context/`` and ``weights/``.
        allowed: The names that its context may use.

    Raises:
        PtqError: If it is not the checkpoint of a GPT-like model.
    """

    def __init__(self, path: Path, allowed: AllowedNames) -> None:
        self._path, self._context, self._allowed = path, path / "context", allowed
        self.parts = checkpoint_parts(path)
        embedding = next((part for part in self.parts if part.key == EMBEDDING_KEY), None)
        if embedding is None:
            raise PtqError(f"{path} holds no {EMBEDDING_KEY}: it is not the checkpoint of a GPT-like model")
        self.size = WeightsSize.of((part.shape, part.dtype) for part in self.parts)
        self.vocab_size: int = embedding.shape[0]

    @cached_property
    def _model(self) -> Call:
        return read_model(self._path, self._allowed)

    @cached_property
    def fields(self) -> ModelFields | None:
        """See :attr:`CheckpointReader.fields`.

        Raises:
            PtqError: If the context names code that is not allowed, or cannot be read.
        """
        return fields_in_context(self._path, self._model, self._allowed)

    @contextmanager
    def model_config(self) -> Iterator[Any]:
        """See :meth:`CheckpointReader.model_config`.

        Raises:
            PtqError: If the context names code that is not allowed, or cannot be read.
        """
        from nemo_ptq.checkpoint.context_build import model_config  # imports NeMo

        yield model_config(self._model, self._context, self._allowed)


def open_checkpoint(path: Path, allowed: AllowedNames, adapter: Path | None = None) -> CheckpointReader:
    """Opens a checkpoint of any kind. Nothing but metadata is read yet.

    Args:
        path: The directory.
        allowed: The names that a NeMo checkpoint's context may use.
        adapter: A LoRA adapter of NeMo's or PEFT's that is merged into its weights as they are read; None for none.

    Raises:
        PtqError: If its kind is unknown, its content cannot become a NeMo model, or the adapter does not fit it.
    """
    found = None if adapter is None else read_adapter(adapter)
    reader = _open(path, allowed, found if isinstance(found, PeftAdapter) else None)
    if isinstance(found, NemoAdapter):
        reader.parts = merged_parts(reader.parts, found)
    return reader


def _open(path: Path, allowed: AllowedNames, adapter: PeftAdapter | None) -> CheckpointReader:
    if is_hugging_face(path):
        from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel

        return HuggingFaceModel(path, adapter)
    if adapter is not None:
        raise PtqError(f"{adapter.path} is an adapter of PEFT's: give the Hugging Face model that it was trained on")
    if is_megatron(path):
        from nemo_ptq.checkpoint.megatron.model import MegatronModel

        return MegatronModel(path)
    return NemoCheckpoint(path, allowed)
