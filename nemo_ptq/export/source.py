# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What every export format is made from: a calibrated model, spread over the ranks that hold it.

Its layers come from a Megatron model or from a checkpoint's files, with a calibration state
(:mod:`nemo_ptq.export.calibrated`), or from ModelOpt's quantizers (:mod:`nemo_ptq.modelopt.megatron_layers`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.config import FP8_CACHE, ExportConfig
from nemo_ptq.export.calibrated import CalibratedLayers
from nemo_ptq.export.layout import Layout
from nemo_ptq.export.packing import Packed
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec


@dataclass(frozen=True)
class Source:
    """A calibrated model as a format's writer sees it.

    Attributes:
        layers: This rank's.
        rank: This rank.
        tensor_rank: Its tensor-parallel rank.
        tensor_ranks: Number of tensor-parallel ranks.
        shard_map: Which rank holds what, and how it is quantized.
        shape: The model's sizes.
        family: The model's family.
        config: Settings of NeMo's, as attributes.
        has_vocab_size: Whether the checkpoint's configuration names its vocabulary's size.
        tokenizer: NeMo's tokenizer, or what has the same ``tokenizer`` of Hugging Face's.
        tokenizer_is_replaced: Whether it replaces the checkpoint's own.
        checkpoint: The NeMo checkpoint that it was loaded from.
        settings: The user's settings.
        cache_format: Format of a quantized KV cache.
    """

    layers: CalibratedLayers
    rank: int
    tensor_rank: int
    tensor_ranks: int
    shard_map: ShardMap
    shape: ModelSpec
    family: Family
    config: Any
    has_vocab_size: bool
    tokenizer: Any
    tokenizer_is_replaced: bool
    checkpoint: Path
    settings: ExportConfig
    cache_format: str = FP8_CACHE

    @property
    def dtype(self) -> torch.dtype:
        """Data type of what stays unquantized."""
        return getattr(torch, self.settings.torch_dtype_name)


@dataclass(frozen=True)
class PackedExport:
    """A directory of packed tensors in one format, before anything of it is written.

    Attributes:
        layout: Layout of its files with tensors.
        pack: Packs this rank's shard of a module, by Megatron's name in the whole model.
        write_documents: Writes everything else into the directory; rank 0 calls it.
    """

    layout: Layout
    pack: Callable[[str], Packed]
    write_documents: Callable[[Path], None]
