# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What every export format is made from: a calibrated model, spread over the ranks that hold it.

It comes from Megatron (:mod:`nemo_ptq.export.megatron`), or from a checkpoint's files and a calibration state
(:mod:`nemo_ptq.export.stored`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.config import ExportConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.export.layers import Layers
from nemo_ptq.export.shard_map import ShardMap
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelShape
from nemo_ptq.quantization.state import CalibrationState


@dataclass(frozen=True)
class Source:
    """A calibrated model as a format's writer sees it.

    Attributes:
        layers: This rank's.
        rank: This rank.
        tensor_rank: Its tensor-parallel rank.
        tensor_ranks: How many of those there are.
        shard_map: Which rank holds what, and how it is quantized.
        shape: The model's sizes.
        family: The model's family.
        config: Settings of NeMo's, as attributes.
        has_vocab_size: Whether the checkpoint's configuration names its vocabulary's size.
        tokenizer: NeMo's tokenizer, or what has the same ``tokenizer`` of Hugging Face's.
        tokenizer_is_replaced: Whether that is another than the checkpoint's own.
        calibration: What was learned of the model, None where it is not quantized.
        checkpoint: The NeMo checkpoint that it was loaded from.
        settings: What the user asked for.
        reporter: Follows the export.
    """

    layers: Layers
    rank: int
    tensor_rank: int
    tensor_ranks: int
    shard_map: ShardMap
    shape: ModelShape
    family: Family
    config: Any
    has_vocab_size: bool
    tokenizer: Any
    tokenizer_is_replaced: bool
    calibration: CalibrationState | None
    checkpoint: Path
    settings: ExportConfig
    reporter: Reporter

    @property
    def dtype(self) -> torch.dtype:
        """Data type of what stays unquantized."""
        return getattr(torch, self.settings.torch_dtype_name)
