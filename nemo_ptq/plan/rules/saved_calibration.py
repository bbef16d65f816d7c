# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A saved calibration: it is of this model, and all that the export needs."""

from typing import Any

from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.state_header import StateHeader, state_file, weights_file


def model_is_quantized_once(calibration_state: Any, model: ModelSpec) -> str | None:
    """A saved calibration is for the checkpoint as it was before."""
    if calibration_state is not None and model.is_quantized:
        return f"calibration_state={calibration_state} with a checkpoint that is quantized already: leave it out"
    return None


def state_is_of_the_model(header: StateHeader, calibration_state: Any, model: ModelSpec) -> str | None:
    """A saved calibration was made of a model of the same shape."""
    if calibration_state is None or model.is_quantized:
        return None
    other = [
        f"{name} {then}, not {now}"
        for name, now in model.identity.items()
        if (then := header.model.get(name)) is not None and then != now and not name.endswith("_class")
    ]
    if other:
        return (
            f"calibration_state={calibration_state} was made of another model ({', '.join(other)}): "
            f"give the checkpoint that was calibrated (then {header.checkpoint})"
        )
    return None


def state_is_repeatable(header: StateHeader, calibration_state: Any) -> str | None:
    """The weight amaxes follow from the weights and the state."""
    if calibration_state is not None and not header.is_repeatable:
        return (
            f"calibration_state={calibration_state} is of ModelOpt's algorithm {header.method}, which searches the "
            "weight amaxes; they are not part of the state: calibrate again"
        )
    return None


def rounded_weights_are_there(header: StateHeader, calibration_state: Any) -> str | None:
    """Weights that were rounded by the data are beside the calibration."""
    if calibration_state is None or not header.quantization.is_balanced:
        return None
    file = weights_file(state_file(calibration_state))
    if file.is_file():
        return None
    return (
        f"calibration_state={calibration_state} is of quality={header.quantization.quality}, and its rounded weights "
        f"are not beside it: give the whole export, or put {file.name} there"
    )


def state_leaves_no_data_to_run(calibration_state: Any, forward_loop: Any) -> str | None:
    """A saved calibration needs no loop over data."""
    if calibration_state is not None and forward_loop is not None:
        return "calibration_state and forward_loop: with a saved calibration nothing is calibrated; give one of them"
    return None
