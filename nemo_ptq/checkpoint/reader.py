# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from: a NeMo 2.0 checkpoint, or a Hugging Face directory that is imported as it is read."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import fiddle as fdl
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from modelopt.torch.opt.plugins.mcore_dist_checkpointing import restore_sharded_modelopt_state
from nemo.lightning import io

from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel
from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.checkpoint.parts import PREFIX, WeightsSize
from nemo_ptq.console.quiet import quiet_prints
from nemo_ptq.errors import PtqError
from nemo_ptq.quantization.modelopt import compute_weight_amax
from nemo_ptq.quantization.state_header import IN_EXPORT, read_header

EMBEDDING_KEY = "embedding.word_embeddings.weight"


class CheckpointReader(Protocol):
    """A model that can be built anywhere, and read shard by shard."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, with the padding that it has at every tensor parallelism."""

    @property
    def size(self) -> WeightsSize:
        """What the whole model takes, optimizer states left out."""

    def model_config(self) -> AbstractContextManager[fdl.Config]:
        """Gives, within a ``with`` block, the fiddle config of NeMo's model and tokenizer, free to be changed."""

    def read_weights(self, module: GPTModel, legacy_ckpt: bool = False) -> None:
        """Reads this rank's shards into a model, in the model's data type.

        Args:
            module: This rank's part of the model. Rows that only its tensor parallelism pads are left as they are.
            legacy_ckpt: Log keys that another version of Transformer Engine has left, instead of refusing them.

        Raises:
            PtqError: If the weights are not those of the model.
        """

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
        self._context, self._weights = path / "context", path / "weights"
        metadata = dist_checkpointing.load_tensors_metadata(str(self._weights))
        if PREFIX + EMBEDDING_KEY not in metadata:
            raise PtqError(
                f"{self._weights} holds no {PREFIX}{EMBEDDING_KEY}: it is not the checkpoint of a GPT-like model"
            )
        weights = [
            tensor for key, tensor in metadata.items() if key.startswith(PREFIX) and not key.endswith("_extra_state")
        ]
        self.size = WeightsSize.of((tensor.global_shape, tensor.dtype) for tensor in weights)
        self.vocab_size: int = metadata[PREFIX + EMBEDDING_KEY].global_shape[0]

    @contextmanager
    def model_config(self) -> Iterator[fdl.Config]:
        """See :meth:`CheckpointReader.model_config`."""
        yield io.load_context(self._context, subpath="model", build=False)

    def read_weights(self, module: GPTModel, legacy_ckpt: bool = False) -> None:
        """See :meth:`CheckpointReader.read_weights`. Quantizers that the checkpoint has are inserted first."""
        if (self._weights / "modelopt_state").is_dir():
            # ModelOpt ranges the weights when it inserts their quantizers: before they are read, of whatever is there.
            for parameter in module.parameters():
                parameter.data.zero_()
        with quiet_prints():
            restore_sharded_modelopt_state([module], self._weights, prefix=PREFIX)
        wanted = {
            # Extra states hold the FP8 recipes of Transformer Engine's own layers, which this model does not have.
            key: value
            for key, value in module.sharded_state_dict(prefix=PREFIX).items()
            if not key.endswith("_extra_state")
        }
        for value in wanted.values():
            if isinstance(value, ShardedTensorFactory):
                # The two halves of a gated layer are read into the parameter's own memory. Megatron would join them
                # into copies of all such layers, a third of the model and more.
                value.merge_fn = lambda halves: None
        state = dist_checkpointing.load(
            wanted,
            str(self._weights),
            strict=StrictHandling.LOG_ALL if legacy_ckpt else StrictHandling.ASSUME_OK_UNEXPECTED,
        )
        module.load_state_dict(
            {key.removeprefix(PREFIX): value for key, value in state.items() if value is not None}, strict=False
        )
        self._compute_weight_amax_again(module)

    def _compute_weight_amax_again(self, module: GPTModel) -> None:
        """Ranges the weights of an export of ours as its calibration did.

        ModelOpt 0.47 stores the rows of a gated first MLP layer's ranges in the order of the tensor-parallel ranks that
        wrote them, and reads them so at any other parallelism.
        """
        state = self._weights.parent / IN_EXPORT
        if state.is_file() and (self._weights / "modelopt_state").is_dir():
            header = read_header(state)
            if header.is_repeatable:
                compute_weight_amax(module, header.modelopt_config)

    def write_context(self, directory: Path) -> None:
        """See :meth:`CheckpointReader.write_context`."""
        shutil.copytree(self._context, directory)


def open_checkpoint(path: Path) -> CheckpointReader:
    """Opens a NeMo 2.0 checkpoint, or a Hugging Face directory. Nothing but metadata is read yet.

    Raises:
        PtqError: If it is neither, or what it holds cannot become a NeMo model.
    """
    return HuggingFaceModel(path) if is_hugging_face(path) else NemoCheckpoint(path)
