# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A saved calibration: it is of this model, and all that the export needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.quantization.state_entries import Shape, entry_problems
from nemo_ptq.quantization.state_header import IN_EXPORT, WEIGHTS_IN_EXPORT, StateHeader, state_file, weights_file
from nemo_ptq.verify.manifest import MANIFEST, read_manifest

# The same weights may have another class and a longer sequence length.
_NOT_COMPARED = ("_class", "seq_length")


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
        if (then := header.model.get(name)) is not None and then != now and not name.endswith(_NOT_COMPARED)
    ]
    if other:
        return (
            f"calibration_state={calibration_state} was made of another model ({', '.join(other)}): "
            f"give the checkpoint that was calibrated (then {header.checkpoint})"
        )
    return None


def state_is_as_it_was_made(state: Path) -> str | None:
    """A saved calibration that lies in an export is the one that the export's manifest lists."""
    directory = state.parents[len(IN_EXPORT.parts) - 1]
    if state != directory / IN_EXPORT or not (directory / MANIFEST).is_file():
        return None
    try:
        entries = read_manifest(directory)
    except PtqError as error:
        return f"calibration_state={state}: {error}; give the export as it was made"
    entry, weights = entries.get(IN_EXPORT.as_posix()), entries.get(WEIGHTS_IN_EXPORT.as_posix())
    file = directory / WEIGHTS_IN_EXPORT
    # The job checks their checksum: they may be as large as the model.
    if weights is not None and file.is_file() and weights.size != file.stat().st_size:
        return (
            f"calibration_state={state}: {WEIGHTS_IN_EXPORT} beside it has not the size that the manifest lists; "
            "copy the export again, or calibrate again"
        )
    if entry is None or not entry.is_of(state):
        listed = "does not list it" if entry is None else f"lists it with another {entry.kind}"
        return (
            f"calibration_state={state} is not as it was made: the export's manifest {listed}; copy the export again, "
            "or calibrate again"
        )
    return None


def state_is_whole(
    header: StateHeader, entries: Mapping[str, tuple[str, Shape]], state: Path, calibration_state: Any, model: ModelSpec
) -> str | None:
    """A saved calibration holds what its algorithm decides of the model's layers, and nothing else."""
    if model.is_quantized or state_is_of_the_model(header, calibration_state, model):
        return None
    problems = list(entry_problems(entries, header, model))
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        return f"calibration_state={state}: {problems[0]}{more}: give the export as it was made, or calibrate again"
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
    """A saved calibration is exported without a forward_loop."""
    if calibration_state is not None and forward_loop is not None:
        return "calibration_state and forward_loop: with a saved calibration nothing is calibrated; give one of them"
    return None
