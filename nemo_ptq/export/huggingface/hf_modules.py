# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Modules that no algorithm quantizes, as Hugging Face directories store them."""

from functools import partial

import torch

from nemo_ptq.export.packing import Packed, all_rows, pack_plain, pack_state_space, split_in_proportion
from nemo_ptq.export.source import Source


def pack_unquantized(source: Source, name: str, factor: torch.Tensor | None) -> Packed:
    """Packs this rank's shard of a norm, an embedding, a router, or what a state space has beside linear layers.

    Args:
        source: The model.
        name: The module's name in the whole model.
        factor: Factor of a norm's output, over all ranks; None for none.
    """
    layers = source.layers
    spec = source.shape.module(name) if name.startswith("decoder.layers.") else None
    if spec is None or spec.kind not in ("conv", "state"):
        if spec is not None and spec.axis == 0 and factor is not None:
            factor = factor.chunk(source.tensor_ranks)[source.tensor_rank]
        return pack_plain(layers.plain(name), source.dtype, factor)
    names = (*spec.parameters, *(["bias"] if spec.has_bias else []))
    parameters = {own: found for own in names if (found := layers.read(f"{name}.{own}")) is not None}
    split = partial(split_in_proportion, spec.rows) if len(spec.rows) > 1 else all_rows
    return pack_state_space(parameters, split, torch.float32 if spec.kind == "state" else source.dtype)
