# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""AWQ's scale search from second moments: one pass over the data, then no data at all.

AWQ (Lin et al., https://arxiv.org/abs/2306.00978) scales input channel j by s_j = x_j^a / w_j^(1-a) before rounding the
weight to INT4 and looks for the exponent ``a`` that changes the layer's output least. ModelOpt's awq_lite multiplies
every calibration batch with eleven candidate weights. The same loss needs only the Gram matrix of the inputs:

    || X D^T ||^2 = tr(D G D^T),   D = W - Q(W s) / s,   G = X^T X

so G is accumulated once and the search costs the same for any number of tokens.

Under tensor parallelism all ranks take one decision from summed statistics, so the result does not depend on how the
layer is sharded (awq_lite lets every rank choose for itself).
"""

import torch

from nemo_ptq.calibration.statistics import Moments, product
from nemo_ptq.parallel.ranks import ALONE, Ranks
from nemo_ptq.quantization.pieces import rows_at_once
from nemo_ptq.quantization.rounding import fake_quantize_int4

_SCALE_RANGE = (1e-4, 1e4)
_TINY = torch.finfo(torch.float32).tiny
# Column stripes of the halved Gram matrix, multiplied one by one: more stripes skip more of its zeros, up to half.
_STRIPES = 8


def relative_magnitude(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sums, over the rows, each weight's magnitude relative to the largest in its block.

    Args:
        weight: (out-features, in-features), in-features a multiple of ``block_size``.
        block_size: Weights that share one INT4 scale.

    Returns:
        float32 (in-features).
    """
    total = torch.zeros(weight.shape[1], device=weight.device)
    for piece in _pieces(weight):
        blocks = piece.float().abs().unflatten(1, (-1, block_size))
        total += (blocks / (blocks.amax(-1, keepdim=True) + _TINY)).flatten(1).sum(0)
    return total


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Splits a weight into groups of rows on a GPU, whose memory is scarce.

    On a CPU the weight stays whole, so that sums over its rows keep their last bit.
    """
    return weight.split(rows_at_once(weight)) if weight.is_cuda else (weight,)


def smoothing_scale(
    activation: torch.Tensor, weight: torch.Tensor, exponent: float, ranks: Ranks = ALONE
) -> torch.Tensor:
    """Returns the factors by which the weight's input channels are multiplied before rounding.

    Args:
        activation: float32 (local in-features): mean magnitude of each input channel.
        weight: float32 (local in-features): mean relative magnitude of each weight column.
        exponent: Between 0, which looks at the weight alone, and 1, which looks at the activation alone.
        ranks: Ranks that share the channels.

    Returns:
        float32 (local in-features), with the geometric middle of the extremes at 1.
    """
    scale = (activation.pow(exponent) / (weight.pow(1 - exponent) + _TINY)).clamp(*_SCALE_RANGE)
    extremes = ranks.max(torch.stack([scale.max(), -scale.min()])).abs()
    return scale / extremes.prod().sqrt()


class _Search:
    """The search for one linear layer's scale.

    Args:
        weight: (local out-features, local in-features).
        moments: Sums over the layer's input, merged over the ranks; its Gram matrix is changed in place.
        ranks: Ranks that share the layer.
        shares_inputs: Whether they share its input channels (row-parallel), else its outputs.
        block_size: Weights that share one INT4 scale.
    """

    def __init__(
        self, weight: torch.Tensor, moments: Moments, ranks: Ranks, shares_inputs: bool, block_size: int
    ) -> None:
        self.weight, self.moments, self.block_size = weight, moments, block_size
        self.ranks = ranks
        self.input_ranks = ranks if shares_inputs else ALONE
        self.output_ranks = ALONE if shares_inputs else ranks
        self.first_input = weight.shape[1] * self.input_ranks.rank

    def best(self, exponents: list[float]) -> torch.Tensor:
        """Returns the scale, float32 (local in-features), whose rounding changes the output least."""
        activation = self.moments.abs_sum / self.moments.count
        rows = self.weight.shape[0] * self.output_ranks.size
        magnitude = self.output_ranks.sum(relative_magnitude(self.weight, self.block_size)) / rows
        gram = _terms(_halved(self.moments.gram, self.first_input), self.weight.dtype)
        scales = (smoothing_scale(activation, magnitude, exponent, self.input_ranks) for exponent in exponents)
        return min(((self._loss(scale, gram), scale) for scale in scales), key=lambda pair: pair[0])[1]

    def _loss(self, scale: torch.Tensor, gram: tuple[torch.Tensor, ...]) -> float:
        """Squared change of the layer's output over all calibration tokens with the weight rounded under ``scale``.

        Args:
            scale: float32 (local in-features).
            gram: The terms of the halved Gram matrix, each (local in-features, in-features).
        """
        loss = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        for weight in _pieces(self.weight):
            error = self._error(weight, scale)
            whole = self.input_ranks.gather(error)
            width = -(-whole.shape[1] // _STRIPES)
            for start in range(0, whole.shape[1], width):
                stripe = slice(start, start + width)
                # Above the diagonal the halved matrix is zero.
                top = max(start - self.first_input, 0)
                if top >= error.shape[1]:
                    break
                for term in gram:
                    loss += (product(error[:, top:], term[top:, stripe]) * whole[:, stripe]).sum(dtype=torch.float64)
        return float(self.ranks.sum(loss))

    def _error(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The change that rounding under ``scale`` makes to rows of the weight."""
        scaled = torch.mul(weight, scale, out=torch.empty_like(weight))
        # Computed in float32, then rounded, the same on both sides of the product: the loss moves by less than 1e-4.
        rounded = fake_quantize_int4(scaled, self.block_size)
        return torch.addcmul(weight, rounded, (1 / scale).to(weight.dtype), value=-1)


def search_scale(
    weight: torch.Tensor,
    moments: Moments,
    block_size: int,
    exponent_step: float = 0.1,
    ranks: Ranks = ALONE,
    shares_inputs: bool = False,
) -> torch.Tensor:
    """Searches AWQ's scale of a linear layer; every rank that shares the layer calls it.

    Args:
        weight: (local out-features, local in-features), local in-features a multiple of ``block_size``.
        moments: Sums over the layer's input, merged over the ranks; its Gram matrix is changed in place.
        block_size: Weights that share one INT4 scale.
        exponent_step: Distance between the exponents tried, from 0 to 1.
        ranks: Ranks that share the layer.
        shares_inputs: Whether they share its input channels (row-parallel), else its outputs.

    Returns:
        float32 (local in-features): the factors by which the weight is multiplied and its input divided; ones where no
        token has entered.
    """
    if not moments.count:
        return torch.ones_like(moments.abs_sum)
    exponents = torch.arange(0, 1 + exponent_step, exponent_step).tolist()
    return _Search(weight, moments, ranks, shares_inputs, block_size).best(exponents)


def _halved(gram: torch.Tensor, first_row: int) -> torch.Tensor:
    """Folds the upper triangle of a symmetric matrix into the lower: D G and D half(G) have the same product with D.

    Args:
        gram: (rows, n), consecutive rows of an (n, n) matrix; changed in place, since it is the largest tensor in
            memory.
        first_row: Which of its rows they begin with.
    """
    gram.tril_(first_row).mul_(2)
    gram.diagonal(first_row).mul_(0.5)
    return gram


def _terms(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Splits a float32 matrix for :func:`product`: two bfloat16 terms hold 16 of its 24 bits.

    The terms take the matrix's place in memory, side by side in each row. On a CPU, which multiplies in float32 anyway,
    the matrix is left as it is.
    """
    if not matrix.is_cuda:
        return (matrix,)
    columns = matrix.shape[1]
    terms = matrix.view(dtype)
    rows = rows_at_once(matrix)
    for numbers, place in zip(matrix.split(rows), terms.split(rows), strict=True):
        high = numbers.to(dtype)
        low = (numbers - high.float()).to(dtype)
        place[:, :columns], place[:, columns:] = high, low
    return terms[:, :columns], terms[:, columns:]
