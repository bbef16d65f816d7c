# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors in the parts that layers own."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import is_linear as is_linear
from nemo_ptq.models.mapping import live_name
from nemo_ptq.models.mapping import shares_inputs as shares_inputs


@dataclass(frozen=True)
class WeightsSize:
    """The size of a model's weights.

    Attributes:
        parameters: Number of parameters of the whole model, each counted once.
        num_bytes: Their bytes in the checkpoint.
    """

    parameters: int
    num_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[Sequence[int], torch.dtype]]) -> "WeightsSize":
        """Adds up tensors, given by shape and data type."""
        sizes = [(math.prod(shape), dtype.itemsize) for shape, dtype in tensors]
        return cls(sum(count for count, _ in sizes), sum(count * itemsize for count, itemsize in sizes))


@dataclass(frozen=True)
class TensorPart:
    """The part of a stored tensor that one layer (or one expert of a layer) takes, read when it is written.

    Megatron stacks the corresponding parameters of its layers: for 32 layers `decoder.layers.mlp.linear_fc2.weight` is
    stored as one tensor of shape (32, hidden, ffn), and each layer is a part of shape (hidden, ffn).

    Attributes:
        key: Name in the checkpoint, without the "module." prefix and without layer or expert numbers.
        shape: Shape of the part, without the stacked axes.
        dtype: Data type as stored.
        read: Gives the part; called once, right before the part is written.
        position: (index, size) along each stacked axis: () for an embedding, ((3, 32),) for layer 3 of 32,
            ((3, 32), (5, 8)) for its expert 5 of 8.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    position: tuple[tuple[int, int], ...] = ()

    @property
    def live_name(self) -> str:
        """Megatron's name of the parameter, its layer and its expert counted through the whole model."""
        return live_name(self.key, *(index for index, _ in self.position))


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuses weights with NaN or infinity; a pass over them that takes no memory.

    Args:
        name: Name of the tensor in its files.
        tensor: Floating-point, on any device.

    Raises:
        PtqError: If a value is not finite.
    """
    if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise PtqError(f"{name} has values that are not finite: the checkpoint is damaged, or its training diverged")


def check_fits(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuses weights that are too large for float16; the other types hold what bfloat16 does.

    Args:
        name: Name of the tensor.
        tensor: Floating-point, finite, on any device.
        dtype: Data type in which it will be stored.

    Raises:
        PtqError: If a value would be infinite.
    """
    if dtype != torch.float16 or tensor.dtype == dtype or not tensor.numel():
        return
    largest = max(abs(extreme.item()) for extreme in tensor.aminmax())
    if torch.tensor(largest).to(dtype).isinf():
        raise PtqError(
            f"{name} has values of up to {largest:.4g}, and float16 holds {torch.finfo(dtype).max:.0f} at most: use "
            "bfloat16 (export_config.dtype=bf16, and the dtype in a Hugging Face config.json)"
        )


def fitting(part: TensorPart, dtype: torch.dtype) -> TensorPart:
    """A part that refuses, as it is read, values that are too large for a data type."""

    def read() -> torch.Tensor:
        tensor = part.read()
        check_fits(part.live_name, tensor, dtype)
        return tensor

    return part if dtype != torch.float16 or part.dtype == dtype else replace(part, read=read)
