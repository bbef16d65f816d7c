# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What every export format is made from: a calibrated model, spread over the ranks that hold it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from nemo_ptq.calibration.state import CalibrationState
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.config import ExportConfig
from nemo_ptq.console import Reporter
from nemo_ptq.export.ownership import Ownership, gather_ownership, global_modules
from nemo_ptq.export.shape import ModelShape, shape_of
from nemo_ptq.families import Family, family_of
from nemo_ptq.job import Job


@dataclass(frozen=True)
class Source:
    """A calibrated model as a format's writer sees it.

    Attributes:
        module: This rank's part of the model.
        modules: Its modules that exports are made of, by their name in the whole model.
        ownership: Which rank holds what, and how it is quantized.
        shape: The model's sizes.
        family: The model's family.
        config: The NeMo config that built it.
        has_vocab_size: Whether the checkpoint's configuration names its vocabulary's size.
        tokenizer: NeMo's tokenizer.
        tokenizer_is_replaced: Whether that is another than the checkpoint's own.
        calibration: What was learned of the model, None where it is not quantized.
        checkpoint: The NeMo checkpoint that it was loaded from.
        settings: What the user asked for.
        reporter: Follows the export.
    """

    module: GPTModel
    modules: dict[str, torch.nn.Module]
    ownership: Ownership
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


def source_of(model: LoadedModel, job: Job, reporter: Reporter) -> Source:
    """Describes a calibrated model; every rank calls it.

    Raises:
        PtqError: If a layer is quantized in a way that cannot be exported.
    """
    modules = global_modules(model.module)
    return Source(
        module=model.module,
        modules=modules,
        ownership=gather_ownership(modules),
        shape=shape_of(model.config, model.vocab_size),
        family=family_of(type(model.config).__name__, job.export.decoder_type),
        config=model.config,
        has_vocab_size=model.has_vocab_size,
        tokenizer=model.tokenizer,
        tokenizer_is_replaced=job.tokenizer_path is not None,
        calibration=model.calibration,
        checkpoint=job.checkpoint,
        settings=job.export,
        reporter=reporter,
    )
