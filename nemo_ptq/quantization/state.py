# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration state as a file: activation statistics and decisions, independent of parallelism.

It holds activation amaxes, pre-quantization scales and the KV cache's amaxes: everything that another export needs
beside the checkpoint. Weight amaxes follow from the checkpoint. Weights that were rounded by the data do not: they are
in a file of their own (:mod:`nemo_ptq.export.rounded_weights`).

For each quantizer of an activation, by the name of its module in the whole model:

    ....input_quantizer.amax               (1,), the activations' data type: largest magnitude
    ....input_quantizer.pre_quant_scale    float32 (in-features): what the input is multiplied with and the weight
                                           divided by
    ....input_quantizer.channel_amax       float32 (in-features): largest magnitude of each channel before that, where
                                           the algorithm has measured it (int8_sq, w4a8_awq)
    ....core_attention.k_bmm_quantizer.amax, v_bmm_quantizer.amax    (1,)
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from nemo_ptq.errors import PtqError
from nemo_ptq.models.mapping import is_linear
from nemo_ptq.quantization.state_header import StateHeader, read_header

_SUMMED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class CalibrationState:
    """The results of a calibration, for the whole model.

    Attributes:
        header: How it was made.
        tensors: By name, on the CPU.
    """

    header: StateHeader
    tensors: Mapping[str, torch.Tensor]


def sum_of_bits(weight: torch.Tensor) -> int:
    """Returns the exact sum of the bits of a tensor in a 16-bit data type, each element an integer."""
    # In pieces: on a CPU torch makes an int64 copy of its input.
    pieces = weight.view(torch.int16).reshape(-1).split(_SUMMED_AT_ONCE)
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)


def is_fingerprinted(name: str) -> bool:
    """Whether a module's weight is part of a model's fingerprint, by Megatron's name of the module."""
    return is_linear(name) or name == "embedding.word_embeddings"


def fingerprint_of(sums: Mapping[str, int]) -> str:
    """Returns the fingerprint of a model's unquantized weights, which does not depend on parallelism.

    As the sums are exact, no sharding, order or padding with zeros changes it, and any training does.

    Args:
        sums: :func:`sum_of_bits` of the whole weight of every module that :func:`is_fingerprinted`.
    """
    return hashlib.sha256(repr(dict(sorted(sums.items()))).encode()).hexdigest()


def of_block(entries: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """Returns the entries of a calibration state that belong to one block: for block ``i + 1`` those of layer ``i``."""
    prefix = f"decoder.layers.{index - 1}."
    return {name: value for name, value in entries.items() if name.startswith(prefix)}


def save_state(path: Path, state: CalibrationState) -> None:
    """Writes a calibration state as a safetensors file: the same state gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(dict(state.tensors), state.header.to_metadata()))


def load_state(path: Path) -> CalibrationState:
    """Reads a calibration state.

    Raises:
        ConfigError: If the file holds none.
        PtqError: If a value cannot be one: amaxes and scales are finite and positive, or 0 of a channel without inputs.
    """
    state = CalibrationState(read_header(path), load_file(path))
    for name, value in state.tensors.items():
        least_is_zero = name.endswith("channel_amax")
        if not (value.isfinite() & ((value >= 0) if least_is_zero else (value > 0))).all():
            raise PtqError(
                f"calibration_state={path}: {name} holds values that are not finite and "
                f"{'at least 0' if least_is_zero else 'positive'}: give the export as it was made, or calibrate again"
            )
    return state


def check_fits(state: CalibrationState, weights: str) -> None:
    """Refuses a state that was learned from other weights.

    Args:
        state: The state.
        weights: The model's fingerprint.

    Raises:
        PtqError: If they differ.
    """
    if weights != state.header.weights:
        raise PtqError(
            "the calibration state was made from other weights than these of the same shape: give the checkpoint that "
            f"was calibrated (then {state.header.checkpoint}), or calibrate this one"
        )
