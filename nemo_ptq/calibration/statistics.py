# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Activation statistics: what a hook gathers from a layer's inputs, and how ranks merge it.

Every statistic is a sum or a maximum, so the order of the batches and the number of ranks do not affect it.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from nemo_ptq.parallel.ranks import Ranks


class Statistic(Protocol):
    """A statistic of one linear layer's input.

    Attributes:
        needs_whole: Whether it needs all channels where ranks share them.
        tokens: How many tokens entered on this rank.
    """

    needs_whole: bool
    tokens: int

    def observe(self, inputs: torch.Tensor, whole: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            inputs: (tokens, local in-features): the channels that this rank's weight multiplies.
            whole: (tokens, in-features): all channels; ``inputs`` itself where the input is not sharded.
        """

    def merge(self, tensor: Ranks, data: Ranks, shares_inputs: bool) -> None:
        """Merges the ranks' statistics.

        Args:
            tensor: The ranks that share the layer.
            data: The ranks that read other samples.
            shares_inputs: Whether the ranks of ``tensor`` share its input channels (row-parallel layers).
        """


class Amax:
    """Largest magnitude of the input.

    Attributes:
        value: (), the input's data type; 0 before any token.
        tokens: How many tokens entered on this rank.
    """

    needs_whole = False

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.value = torch.zeros((), dtype=dtype, device=device)
        self.tokens = 0

    def observe(self, inputs: torch.Tensor, whole: torch.Tensor) -> None:
        """See :meth:`Statistic.observe`."""
        self.tokens += inputs.shape[0]
        if inputs.numel():
            self.value = torch.maximum(self.value, inputs.abs().amax())

    def merge(self, tensor: Ranks, data: Ranks, shares_inputs: bool) -> None:
        """See :meth:`Statistic.merge`."""
        data.max(tensor.max(self.value))


class ChannelAmax:
    """Largest magnitude of each input channel.

    Attributes:
        value: (local in-features), the input's data type.
        tokens: How many tokens entered on this rank.
    """

    needs_whole = False

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.value = torch.zeros(features, dtype=dtype, device=device)
        self.tokens = 0

    def observe(self, inputs: torch.Tensor, whole: torch.Tensor) -> None:
        """See :meth:`Statistic.observe`."""
        self.tokens += inputs.shape[0]
        if inputs.numel():
            self.value = torch.maximum(self.value, inputs.abs().amax(0))

    def merge(self, tensor: Ranks, data: Ranks, shares_inputs: bool) -> None:
        """See :meth:`Statistic.merge`."""
        data.max(self.value)
        if not shares_inputs:
            tensor.max(self.value)


class Moments:
    """Sums over all tokens of a layer's input.

    Attributes:
        gram: float32 (local in-features, in-features): this rank's rows of X^T X.
        abs_sum: float32 (local in-features): sum of |x|.
        amax: float32 (local in-features): largest |x|.
        count: float32 (): tokens of all ranks, once merged.
        tokens: How many tokens entered on this rank.
    """

    needs_whole = True

    def __init__(self, local_features: int, features: int, device: torch.device) -> None:
        self.gram = torch.zeros(local_features, features, device=device)
        self.abs_sum = torch.zeros(local_features, device=device)
        self.amax = torch.zeros(local_features, device=device)
        self.count = torch.zeros((), device=device)
        self.tokens = 0

    def observe(self, inputs: torch.Tensor, whole: torch.Tensor) -> None:
        """See :meth:`Statistic.observe`."""
        self.tokens += inputs.shape[0]
        if not inputs.numel():
            return
        magnitude = inputs.abs()
        add_product(self.gram, inputs.T, whole)
        self.abs_sum += magnitude.sum(0, dtype=torch.float32)
        self.amax = torch.maximum(self.amax, magnitude.amax(0).float())
        self.count += inputs.shape[0]

    def merge(self, tensor: Ranks, data: Ranks, shares_inputs: bool) -> None:
        """See :meth:`Statistic.merge`."""
        for total in (self.gram, self.abs_sum, self.count):
            data.sum(total)
        data.max(self.amax)


class PairedMoments:
    """Sums over a layer's input in the quantized model, and over how far that differs from the unquantized model's.

    Attributes:
        gram: float32 (local in-features, in-features): this rank's rows of X_q^T X_q; whole once merged.
        cross: The same of (X - X_q)^T X_q; None where the two inputs are not compared.
        lack: float32 (local in-features): sum of (X - X_q)^2.
        residual: float32 (out-features, local in-features): (R - R_q)^T X_q, with R the residual stream that the
            layer's output is added to; None where that is not compared.
        residual_lack: float32 (): sum of (R - R_q)^2.
        count: float32 (): tokens of all ranks, once merged.
        tokens: How many tokens entered on this rank.
    """

    def __init__(
        self, local_features: int, features: int, device: torch.device, compares: bool, outputs: int | None = None
    ) -> None:
        self.gram = torch.zeros(local_features, features, device=device)
        self.cross = torch.zeros_like(self.gram) if compares else None
        self.residual = None if outputs is None else torch.zeros(outputs, local_features, device=device)
        self.lack, self.count = torch.zeros(local_features, device=device), torch.zeros((), device=device)
        self.residual_lack = torch.zeros((), device=device)
        self.tokens = 0
        self._is_half = device.type == "cuda" and local_features == features

    def observe(
        self,
        inputs: torch.Tensor,
        whole: torch.Tensor,
        exact: torch.Tensor | None,
        residual: torch.Tensor | None = None,
    ) -> None:
        """Adds tokens.

        Args:
            inputs: (tokens, local in-features): what this rank's weight multiplies in the quantized model.
            whole: (tokens, in-features): all channels of it.
            exact: As ``inputs``, of the unquantized model and the same tokens; None where they are not compared.
            residual: (tokens, out-features): what the residual stream of the quantized model lacks.
        """
        self.tokens += inputs.shape[0]
        if not inputs.numel():
            return
        if self._is_half:
            add_upper_half(self.gram, inputs)
        else:
            add_product(self.gram, inputs.T, whole)
        self.count += inputs.shape[0]
        if self.cross is not None:
            assert exact is not None
            difference = exact - inputs
            add_product(self.cross, difference.T, whole)
            self.lack += _squares(difference)
        if self.residual is not None:
            assert residual is not None
            add_product(self.residual, residual.T, inputs)
            self.residual_lack += residual.float().square().sum()

    def smooth(self, local: torch.Tensor, whole: torch.Tensor) -> None:
        """Multiplies the inputs with a pre-quantization scale.

        Args:
            local: float32 (local in-features).
            whole: float32 (in-features).
        """
        for matrix in (self.gram, self.cross):
            if matrix is not None:
                matrix *= local[:, None] * whole[None]
        if self.residual is not None:
            self.residual *= local
        self.lack *= local.square()

    def merge(self, data: Ranks) -> None:
        """Merges the statistics of ranks that read other samples."""
        for total in (self.gram, self.lack, self.count, self.residual_lack):
            data.sum(total)
        if self._is_half:
            mirror_upper_half(self.gram)
        for matrix in (self.cross, self.residual):
            if matrix is not None:
                data.sum(matrix)


class Several:
    """Several statistics of one input.

    Args:
        statistics: At least one.

    Attributes:
        needs_whole: Whether one of them needs all channels.
    """

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        self._statistics = statistics
        self.needs_whole = any(statistic.needs_whole for statistic in statistics)

    @property
    def tokens(self) -> int:
        """How many tokens entered on this rank."""
        return self._statistics[0].tokens

    def observe(self, inputs: torch.Tensor, whole: torch.Tensor) -> None:
        """See :meth:`Statistic.observe`."""
        for statistic in self._statistics:
            statistic.observe(inputs, whole if statistic.needs_whole else inputs)

    def merge(self, tensor: Ranks, data: Ranks, shares_inputs: bool) -> None:
        """See :meth:`Statistic.merge`."""
        for statistic in self._statistics:
            statistic.merge(tensor, data, shares_inputs)


# One batch in this many is held out; tokens kept of each held-out batch, and of all of them.
_HELD_OUT, _KEPT_OF_BATCH, _KEPT = 4, 256, 1024


class HeldOutChannels:
    """Largest magnitude of each input channel, separately for held-out batches, and some tokens of these.

    Attributes:
        value: (local in-features), the input's data type: over the batches that are not held out.
        held_out: The same for the batches that are held out.
        sample: (tokens, in-features), the input's data type: tokens that are held out, at most 1024.
        tokens: How many tokens entered on this rank.
    """

    needs_whole = True

    def __init__(self, features: int, whole_features: int, dtype: torch.dtype, device: torch.device) -> None:
        self.value = torch.zeros(features, dtype=dtype, device=device)
        self.held_out = torch.zeros_like(self.value)
        self.sample = torch.zeros(0, whole_features, dtype=dtype, device=device)
        self.tokens = self._batches = 0

    def observe(self, inputs: torch.Tensor, whole: torch.Tensor) -> None:
        """See :meth:`Statistic.observe`."""
        self.tokens += inputs.shape[0]
        is_held_out = self._batches % _HELD_OUT == 0
        self._batches += 1
        amax = inputs.abs().amax(0)
        if not is_held_out:
            self.value = torch.maximum(self.value, amax)
            return
        self.held_out = torch.maximum(self.held_out, amax)
        kept = whole[:: -(-len(whole) // _KEPT_OF_BATCH)]
        self.sample = torch.cat([self.sample, kept[: _KEPT - len(self.sample)]])

    def merge(self, tensor: Ranks, data: Ranks, shares_inputs: bool) -> None:
        """See :meth:`Statistic.merge`."""
        for amax in (self.value, self.held_out):
            data.max(amax)
            if not shares_inputs:
                tensor.max(amax)
        if not self.value.any():  # a single batch
            self.value = self.held_out.clone()
        if data.size > 1:
            everyones = self.sample.new_zeros(data.size, _KEPT // data.size, self.sample.shape[1])
            mine = self.sample[:: data.size][: everyones.shape[1]]
            everyones[data.rank, : len(mine)] = mine
            self.sample = data.sum(everyones).flatten(0, 1)


# Rows of a Gram matrix that are added to at a time on a GPU: the product would else need as much memory as the matrix.
_ROWS_AT_ONCE = 4096


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiplies two matrices of any one floating-point type, and sums in float32.

    A GPU takes bfloat16 at its full rate, a tenfold of float32's, and loses nothing by it: the operands are exact. Only
    GPUs have this product.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _squares(values: torch.Tensor) -> torch.Tensor:
    """Sums the squares of each column of (tokens, features) in float32."""
    if values.is_cuda:  # in one pass, without a float32 copy
        return torch.linalg.vector_norm(values, dim=0, dtype=torch.float32).square()
    return values.float().square().sum(0)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds the :func:`product` of (m, k) and (k, n) to float32 (m, n), in place."""
    if not left.is_cuda:
        total += product(left, right)
        return
    for rows, part in zip(total.split(_ROWS_AT_ONCE), left.split(_ROWS_AT_ONCE), strict=True):
        torch.addmm(rows, part, right, out_dtype=torch.float32, out=rows)


# Rows of a Gram matrix per step, in which a GPU skips the part left of the diagonal.
_ROWS_OF_HALF = 2048


def add_upper_half(gram: torch.Tensor, inputs: torch.Tensor) -> None:
    """Adds X^T X of (tokens, n) to float32 (n, n), in place: the part right of the diagonal, and some of the rest."""
    for start in range(0, len(gram), _ROWS_OF_HALF):
        rows = slice(start, start + _ROWS_OF_HALF)
        add_product(gram[rows, start:], inputs.T[rows], inputs[:, start:])


def mirror_upper_half(gram: torch.Tensor) -> None:
    """Completes the sum of :func:`add_upper_half`."""
    for start in range(0, len(gram), _ROWS_OF_HALF):
        stop = start + _ROWS_OF_HALF
        gram[stop:, start:stop] = gram[start:stop, stop:].T
