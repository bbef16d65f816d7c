# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The interface of a model's files that the forward pass uses, whatever their format."""

from typing import Protocol

import torch

from nemo_ptq.verify.linear import Stack, Tensors
from nemo_ptq.verify.model_config import ModelConfig


class Weights(Protocol):
    """A model on disk. Its parts have the names that a qnemo directory with a single rank gives them.

    All methods read from the files whenever they are called, and raise PtqError where something is not there.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""

    def tensor(self, name: str) -> torch.Tensor:
        """Reads an unquantized tensor: an embedding, a norm, a router."""

    def linear(self, name: str, device: torch.device) -> Stack:
        """Reads a linear layer such as "transformer.layers.7.mlp.fc", or "lm_head".

        The rows of "attention.qkv" are all queries, all keys, all values.
        """

    def experts(self, name: str, device: torch.device) -> list[Stack]:
        """Reads the same linear layer of every expert; "mlp.fc" has the rows that are not activated first."""

    def kv_cache(self, layer: int, device: torch.device) -> tuple[Tensors, Tensors] | None:
        """Returns functions that round a layer's keys and values as its cache does; None if it is not quantized."""
