# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of Megatron-LM or Megatron-Bridge as a NeMo model: its configuration and its tensors."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fiddle as fdl
import torch

from nemo_ptq.checkpoint.megatron.description import EMBEDDING, OUTPUT, describe_megatron
from nemo_ptq.checkpoint.parts import TensorPart, WeightsSize
from nemo_ptq.checkpoint.torch_dist import checkpoint_parts
from nemo_ptq.console.quiet import import_nemo

# By NeMo's name, where NeMo's class does not say it itself.
_ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
}


class MegatronModel:
    """A checkpoint as a NeMo model, none of its tensors read yet.

    Args:
        path: Its root, or one of its iterations.

    Attributes:
        parts: Every part of every tensor, as NeMo stores it.
        vocab_size: Rows of the embedding.
        size: Size of the whole model.
        spec: The model.

    Raises:
        PtqError: As :func:`~nemo_ptq.checkpoint.megatron.description.describe_megatron`.
    """

    def __init__(self, path: Path) -> None:
        self._described = describe_megatron(path)
        self.spec, self.vocab_size = self._described.chosen.spec, self._described.rows
        self.parts = _unpadded(checkpoint_parts(self._described.iteration), self.vocab_size)
        if not self._described.chosen.spec.tied_embeddings:
            self.parts = _with_output_layer(self.parts)
        self.size = WeightsSize.of((part.shape, part.dtype) for part in self.parts)

    @property
    def config(self) -> SimpleNamespace:
        """NeMo's configuration of the model, as attributes, as far as it is not NeMo's default."""
        return SimpleNamespace(**{"generation_config": None, **self._described.chosen.arguments})

    @property
    def has_vocab_size(self) -> bool:
        """Whether the checkpoint says how many rows of its embedding are the vocabulary."""
        return self._described.has_vocab_size

    @property
    def tokenizer(self) -> Path | None:
        """Directory with the tokenizer, None where the checkpoint has none."""
        return self._described.tokenizer

    @property
    def fields(self) -> None:
        """See :attr:`~nemo_ptq.checkpoint.reader.CheckpointReader.fields`: NeMo's classes have the defaults."""
        return None

    @contextmanager
    def model_config(self) -> Iterator[fdl.Config]:
        """Gives, within a ``with`` block, the configuration of NeMo's model and tokenizer, free to be changed.

        The tokenizer is None where the checkpoint has none, and so is the size of the vocabulary.
        """
        config = self._model_config(self._described.tokenizer)
        if not self.has_vocab_size:
            config.config.vocab_size = None
        yield config

    def write_context(self, directory: Path, tokenizer: Any) -> None:
        """Makes the ``context/`` directory of a NeMo checkpoint.

        Args:
            directory: The directory to make.
            tokenizer: The Hugging Face tokenizer to copy into it.
        """
        from nemo_ptq.checkpoint.writer import write_context

        with tempfile.TemporaryDirectory() as scratch:
            files = Path(scratch, "nemo_tokenizer")
            tokenizer.save_pretrained(files)
            write_context(directory, self._model_config(files))

    def _model_config(self, tokenizer: Path | None) -> fdl.Config:
        import_nemo()
        from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

        chosen, dtype = self._described.chosen, getattr(torch, self._described.dtype)
        arguments = dict(chosen.arguments)
        if isinstance(function := arguments.get("activation_func"), str):
            arguments["activation_func"] = _imported(_ACTIVATIONS[function])
        arguments |= {
            "vocab_size": self.vocab_size,
            "make_vocab_size_divisible_by": math.gcd(self.vocab_size, 128),
            "fp16": dtype == torch.float16,
            "bf16": dtype == torch.bfloat16,
            "params_dtype": dtype,
        }
        config = fdl.Config(_imported(chosen.nemo_config), **arguments)
        files = None if tokenizer is None else fdl.Config(AutoTokenizer, pretrained_model_name=str(tokenizer))
        return fdl.Config(_imported(chosen.nemo_model), config=config, tokenizer=files)


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _unpadded(parts: Sequence[TensorPart], rows: int) -> list[TensorPart]:
    """Removes the padding rows of the embedding and the output layer."""

    def cut(part: TensorPart) -> TensorPart:
        return replace(part, shape=(rows, *part.shape[1:]), read=lambda: part.read()[:rows])

    return [cut(part) if part.key in (EMBEDDING, OUTPUT) and part.shape[0] > rows else part for part in parts]


def _with_output_layer(parts: Sequence[TensorPart]) -> list[TensorPart]:
    """Has the embedding stand for an output layer that is tied to it, where NeMo's class has one of its own."""
    if any(part.key == OUTPUT for part in parts):
        return list(parts)
    embedding = next(part for part in parts if part.key == EMBEDDING)
    return [*parts, replace(embedding, key=OUTPUT)]
