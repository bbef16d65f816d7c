# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Merge adapters into weights, one weight at a time, as they are read."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from nemo_ptq.checkpoint.adapters.nemo_adapter import NemoAdapter
from nemo_ptq.checkpoint.index import StoredTensor
from nemo_ptq.checkpoint.parts import TensorPart, check_finite
from nemo_ptq.checkpoint.torch_dist import read_part
from nemo_ptq.errors import PtqError

_WEIGHT = ".weight"


def add_low_rank(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, scale: float) -> torch.Tensor:
    """Adds the product of two matrices to a weight.

    Args:
        weight: (out, in).
        first: (rank, in).
        second: (out, rank).
        scale: Factor of the product.

    Returns:
        (out, in) in float32, in which all of it is computed.
    """
    return weight.float() + (scale * second.float()) @ first.float()


def merged_parts(parts: Sequence[TensorPart], adapter: NemoAdapter) -> list[TensorPart]:
    """Returns the parts of a checkpoint with NeMo's LoRA merged into those that it changes.

    Args:
        parts: Every part of every tensor.
        adapter: One that fits the model.

    Raises:
        PtqError: If a matrix has no weight.
    """
    merged, unused = [], set(adapter.linears)
    for part in parts:
        linear, index = _linear_of(part, adapter)
        unused.discard(linear)
        merged.append(replace(part, read=partial(_read_merged, part, adapter, linear, index)) if linear else part)
    if unused:
        raise PtqError(f"the adapter {adapter.path} changes {min(unused)}, which the checkpoint does not hold")
    return merged


def _linear_of(part: TensorPart, adapter: NemoAdapter) -> tuple[str, tuple[int, ...]]:
    """The layer of an adapter that changes a part, and its place in the stacked matrices; "" for none."""
    numbered = part.live_name.replace(".local_experts.", ".experts.")
    for key, index in ((part.key, tuple(number for number, _ in part.position)), (numbered, ())):
        linear = key.removesuffix(_WEIGHT)
        if key.endswith(_WEIGHT) and linear in adapter.linears:
            return linear, index
    return "", ()


def _read_merged(part: TensorPart, adapter: NemoAdapter, linear: str, index: tuple[int, ...]) -> torch.Tensor:
    def read(tensor: StoredTensor) -> torch.Tensor:
        # Experts can share one matrix, which then has no axis for them.
        matrix = read_part(adapter.weights, tensor, index[: len(tensor.shape) - 2])
        check_finite(f"{adapter.path}: the adapter of {part.live_name}", matrix)
        return matrix

    first, groups = adapter.linears[linear]
    merged = add_low_rank(part.read(), read(first), torch.cat([read(rows) for rows in groups]), adapter.scale)
    return merged.to(part.dtype)
