# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The calibration data: it can be read, and its samples are not too long for the model."""

from itertools import islice
from math import ceil
from typing import Any

from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.config import NO_QUANT, QuantizationConfig, read_sources
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec


def data_is_readable(
    calibration_dataset: str, calibration_dataset_size: int, evaluation_dataset_size: int, forward_loop: Any
) -> str | None:
    """Each sample of a local data file that will be read is a text or a chat."""
    if forward_loop is not None:
        return None
    sources, samples = read_sources(calibration_dataset), calibration_dataset_size + evaluation_dataset_size
    total = sum(source.weight for source in sources)
    for source in sources:
        if source.is_file:
            wanted = ceil(samples * source.weight / total)
            try:
                # All of them, so that a wrong one is found.
                has_text = [bool(sample) for sample in islice(read_text_file(source.name, source.column), wanted)]
            except PtqError as error:
                return f"quantization_config.{error}"
            if wanted and not any(has_text):
                return (
                    f"quantization_config.calibration_dataset={source.name}: the samples that would be read have no "
                    "text; give a file with texts"
                )
    return None


def recovery_is_measured(
    min_recovery: float | None,
    evaluation_dataset_size: int,
    algorithm: str | None,
    forward_loop: Any,
    calibration_state: Any,
    model: ModelSpec,
) -> str | None:
    """A recovery that is asked for can be measured: the job reads text that both models are compared on."""
    if min_recovery is None:
        return None
    option = f"export_config.min_recovery={min_recovery}"
    if not evaluation_dataset_size:
        return f"{option} needs samples to compare on: give quantization_config.evaluation_dataset_size"
    whys = {
        "algorithm=no_quant loses nothing": QuantizationConfig(algorithm).algorithm_name == NO_QUANT,
        "a forward_loop gives no text to compare on": forward_loop is not None,
        "a saved calibration leaves no text to compare on": calibration_state is not None or model.is_quantized,
    }
    for why, holds in whys.items():
        if holds:
            return f"{option} is not measured, since {why}: leave it out, and compare with `nemo-ptq evaluate`"
    return None


def positions_suffice(calibration_seq_len: int, model: ModelSpec) -> str | None:
    """A model with learned position embeddings has none beyond its sequence length."""
    if model.position_embedding_type == "learned_absolute" and calibration_seq_len > model.seq_length:
        return (
            f"quantization_config.calibration_seq_len={calibration_seq_len} is longer than the model's "
            f"{model.seq_length} positions: use at most {model.seq_length}"
        )
    return None
