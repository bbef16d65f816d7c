# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One block of weights at a time: jobs that cannot run like that, and leftovers of unfinished runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.output_lock import owner_of
from nemo_ptq.export.leftover import find_leftover
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.residence import whole_model_needs

_WAYS_OUT = {
    "generate_sample": "set export_config.generate_sample=false, or leave layerwise out",
    "algorithm": "use one of the built-in algorithms, or leave layerwise out",
    "forward_loop": "leave out forward_loop and give calibration_dataset, or leave layerwise out",
    "checkpoint": "give the checkpoint as it was before, with calibration_state, or leave layerwise out",
    "formats": "leave it out of export_config.export_format, or leave layerwise out",
}


def layerwise_is_possible(
    layerwise: bool | None,
    generate_sample: bool,
    algorithm: str | None,
    forward_loop: Any,
    model: ModelSpec,
    formats: Sequence[str],
) -> str | None:
    """Nothing needs the whole model in memory where one block of weights at a time was asked for."""
    if not layerwise:
        return None
    needs = whole_model_needs(generate_sample, algorithm, forward_loop is not None, model.is_quantized, formats)
    for what, why in needs.items():
        return f"quantization_config.layerwise=true keeps one block of weights in memory, and {why}: {_WAYS_OUT[what]}"
    return None


def leftover_is_wanted(path: Any, resume: bool) -> str | None:
    """What an unfinished run has left is continued (export_config.resume), or was removed."""
    output = Path(path).expanduser().absolute()
    leftover = find_leftover(output)
    if leftover is None or resume or owner_of(output) is not None:  # which goes on with it
        return None
    return leftover.in_the_way_of(path)
