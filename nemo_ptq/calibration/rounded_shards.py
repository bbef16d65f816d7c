# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Rounding of one rank's shard of a linear layer, from the moments of its inputs."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from nemo_ptq.calibration.gptq import (
    InverseFactor,
    Rounded,
    coarse_products,
    inverse_factor,
    moved,
    predictable_share,
    unit_factor,
)
from nemo_ptq.calibration.methods import LinearShard
from nemo_ptq.calibration.rounders import Rounder
from nemo_ptq.calibration.statistics import Moments, PairedMoments
from nemo_ptq.parallel.ranks import Ranks

# An expert is rounded as if it had seen this many more of its layer's average tokens for each of its in-features.
_BORROWED = 0.1


def share_among_experts(moments: Sequence[PairedMoments | Moments], ranks: Ranks) -> None:
    """Adds to the Gram matrix of each expert the mean square of each channel over all experts of its layer.

    An expert that saw many more tokens than it has in-features hardly notices; one that saw few is kept from making up
    for errors through what these few tokens happened to have in common.

    Args:
        moments: Those of the same linear layer in each expert, merged.
        ranks: The ranks that share its inputs, or any others where they do not.
    """
    tokens = torch.stack([each.count for each in moments]).sum()
    if not tokens:
        return
    diagonals = [_own_diagonal(each.gram, ranks) for each in moments]
    borrowed = torch.stack(diagonals).sum(0) * (_BORROWED * moments[0].gram.shape[1] / tokens)
    for diagonal in diagonals:
        diagonal += borrowed


def _own_diagonal(gram: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The part of a Gram matrix's diagonal that is in this rank's rows of it, a view."""
    is_whole = len(gram) == gram.shape[1]
    return gram.diagonal(0 if is_whole else len(gram) * ranks.rank)


def round_shard(linear: LinearShard, weight: torch.Tensor, moments: PairedMoments | None, rounder: Rounder) -> Rounded:
    """Rounds this rank's shard of a layer; every rank that shares the layer calls it.

    Where the ranks share the inputs of a layer, each rounds some whole rows of it, and hands the others their columns.

    Args:
        linear: The layer.
        weight: float32 (local out-features, local in-features): the weight to round.
        moments: Sums over the layer's inputs, merged over the ranks that read other samples; None rounds to nearest.
        rounder: How it is rounded.
    """
    ranks = linear.input_ranks
    weight = ranks.shard(ranks.gather(weight), 0)
    with coarse_products(weight.device):
        if moments is None:
            factor = unit_factor(weight.shape[1], weight.device)
        else:
            gram = ranks.gather(moments.gram.T)  # symmetric
            factor = inverse_factor(gram, rounder.sorts)
            weight = _target(weight, moments, gram, factor, ranks)
        rounded = rounder.round(weight, factor, linear.ranks)
    return shard_of_rows(rounded, linear)


def shard_of_rows(rounded: Rounded, linear: LinearShard) -> Rounded:
    """Returns this rank's shard of a layer after each rank has rounded some whole rows of it; every rank calls it.

    Args:
        rounded: Where the ranks share the inputs of the layer, this rank's rows of it; else its shard.
        linear: The layer.
    """
    ranks = linear.input_ranks
    if ranks.size == 1:
        return rounded
    scale = rounded.scale
    if scale.dim() == 2:
        scale = _own_columns(scale, linear)
    elif scale.numel() > 1:
        scale = ranks.gather(scale)
    return replace(
        rounded,
        codes=_own_columns(rounded.codes, linear),
        scale=scale,
        weight=_own_columns(rounded.weight, linear),
    )


def _target(
    weight: torch.Tensor, moments: PairedMoments, gram: torch.Tensor, factor: InverseFactor, ranks: Ranks
) -> torch.Tensor:
    """Moves some whole rows of a weight toward the unquantized model's output, as far as that can be predicted."""

    def share(cross: torch.Tensor, lack: torch.Tensor) -> torch.Tensor:
        return predictable_share(cross, factor, gram.diagonal().mean(), lack, moments.count)

    lacks = []
    if moments.cross is not None:
        cross = ranks.gather(moments.cross.T).T
        if (part := share(cross, ranks.sum(moments.lack.sum()))) > 0:
            lacks.append(weight @ (part * cross))
    if moments.residual is not None:
        residual = ranks.gather(moments.residual)
        if (part := share(residual, moments.residual_lack)) > 0:
            lacks.append(part * ranks.shard(residual, 0))
    return moved(weight, sum(lacks[1:], lacks[0]), factor) if lacks else weight


def _own_columns(rows: torch.Tensor, linear: LinearShard) -> torch.Tensor:
    """Turns each rank's rows of a matrix, (rows, in), into its columns, (out, local in)."""
    # Process groups do not support FP8.
    as_bytes = rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
    columns = linear.input_ranks.shard(linear.input_ranks.gather(as_bytes.T).T)
    return columns.contiguous().view(rows.dtype)
