# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Algorithm "auto": there is something to choose from, and a choice that keeps within the bits that are asked for."""

from collections.abc import Collection, Sequence
from typing import Any

from nemo_ptq.config import AUTO, FAST, NO_QUANT, QuantizationConfig, read_list
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.export.mixing import layer_groups, least_bits, mixable
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.quality import obstacle_to_balanced
from nemo_ptq.quantization.algorithms import algorithm_of
from nemo_ptq.quantization.state_header import StateHeader

_OPTION = f"quantization_config.algorithm={AUTO}"


def bits_go_with_auto(
    algorithm: str | None, effective_bits: float | None, candidates: Any, min_recovery: float | None
) -> str | None:
    """Bits on average, and algorithms to choose from, are for the algorithm that chooses, which needs an aim."""
    chooses = algorithm_of(QuantizationConfig(algorithm)).chooses
    for name, value in (("effective_bits", effective_bits), ("candidates", candidates)):
        if value is not None and not chooses:
            return f"quantization_config.{name}={value} is for algorithm={AUTO}: leave it out, or use it"
    if chooses and effective_bits is None and min_recovery is None:
        return (
            f"{_OPTION} needs quantization_config.effective_bits, the bits of a weight on average, such as 6; or "
            "export_config.min_recovery, such as 0.99, for the fewest bits that reach it"
        )
    return None


def formats_mix(algorithm: str | None, formats: Sequence[str], candidates: Any = None) -> str | None:
    """Every format asked for can hold layers that are quantized in several ways, and its servers load what is named."""
    if not algorithm_of(QuantizationConfig(algorithm)).chooses:
        return None
    for name in formats:
        if not mixable([name]):
            able = " or ".join(other for other in FORMATS if mixable([other]))
            return f"{_OPTION} does not go into export_format={name}, whose layers are alike: use export_format={able}"
    known = mixable(formats)
    lost = [name for name in read_list(candidates) if name not in known]
    if lost:
        return (
            f"quantization_config.candidates={','.join(lost)}: servers of export_format={','.join(formats)} do not "
            f"load it side by side with others: choose from {', '.join(known)}"
        )
    return None


def choice_is_rounded_balanced(
    quality: str | None,
    algorithm: str | None,
    formats: Sequence[str],
    forward_loop: Any,
    calibration_tp: int,
    calibration_ep: int,
    model: ModelSpec,
) -> str | None:
    """Layers that are chosen for are rounded with quality "balanced", which is available."""
    if quality != FAST or not algorithm_of(QuantizationConfig(algorithm)).chooses or formats_mix(algorithm, formats):
        return None
    obstacle = obstacle_to_balanced(algorithm, formats, forward_loop, calibration_tp, calibration_ep, model)
    reason, fix = obstacle or (f"quality={FAST} was asked for", "leave quality out")
    return f"{_OPTION} chooses by the errors of quality balanced, which is not available, since {reason}: {fix}"


def bits_are_reachable(
    effective_bits: float | None,
    algorithm: str | None,
    awq_block_size: int,
    formats: Sequence[str],
    calibration_tp: int,
    model: ModelSpec,
    unquantized: Collection[str],
    candidates: Any = None,
    calibration_state: Any = None,
) -> str | None:
    """Some choice has as few bits as are asked for."""
    quantization = QuantizationConfig(
        algorithm, awq_block_size=awq_block_size, effective_bits=effective_bits, candidates=candidates
    )
    if effective_bits is None or not algorithm_of(quantization).chooses or calibration_state is not None:
        return None
    least = least_bits(layer_groups(quantization, model, formats, calibration_tp, unquantized), quantization)
    if effective_bits < least:
        return (
            f"quantization_config.effective_bits={effective_bits:g} is less than any choice takes that "
            f"export_format={','.join(formats)} can hold: use at least {least + 5e-4:.3f}"
        )
    return None


def state_goes_into_formats(header: StateHeader, calibration_state: Any, formats: Sequence[str]) -> str | None:
    """What a saved calibration has chosen for its layers is what the format's servers load side by side."""
    if calibration_state is None or formats_mix(header.quantization.algorithm_name, formats):
        return None
    for name in formats:
        lost = sorted(set(header.choice.values()) - {NO_QUANT, *FORMATS[name].mixes})
        if lost:
            return (
                f"calibration_state={calibration_state} has layers in {' and '.join(lost)}, which "
                f"export_format={name} does not mix with others: use another format, or calibrate for this one"
            )
    return None
