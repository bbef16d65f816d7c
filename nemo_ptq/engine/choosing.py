# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Algorithm "auto": a walk of its own that measures what each option would change, and the choice among them.

The aim is a number of bits, or a recovery of the perplexity. For the latter the fewest bits are tried first. What is
lost is taken to grow with the predicted error, so that each trial tells how large that may be, until one reaches the
recovery.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_ptq.calibration.bit_allocation import Allocation, Cost, allocate, sweep
from nemo_ptq.calibration.error_learner import ErrorLearner, Way, Ways
from nemo_ptq.calibration.pipeline import walk
from nemo_ptq.calibration.rounders import rounder_for
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.export.calibrated import algorithm_scheme
from nemo_ptq.export.mixing import LayerGroup, bits_of, layer_groups
from nemo_ptq.job import Job
from nemo_ptq.quantization.algorithms import quantization_of_layer
from nemo_ptq.report.records import MixedPrecision, mixed_precision

if TYPE_CHECKING:  # builds Megatron's models, which the decisions here can do without
    from nemo_ptq.checkpoint.loading import LoadedModel

# Of each group of layers, by its name and the option.
Errors = Mapping[str, Mapping[str, float]]

# In the journal's directory: another choice would not fit the blocks that are written.
_FILE = "choice.json"
# Points of the curve that are kept.
_POINTS = 64
# Choices that are tried for a recovery, and what the predicted error is at most of the last one's, so that they end.
_TRIALS, _LESS = 6, 0.6


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        algorithms: Name of the algorithm of each linear layer, "no_quant" among them, by Megatron's name of the layer.
        record: What the report says of it; None where the calibration came from a file.
        errors: What was measured of each group of layers, by its name and the option.
    """

    algorithms: Mapping[str, str]
    record: MixedPrecision | None
    errors: Errors = field(default_factory=dict)


def choose_algorithms(
    job: Job,
    model: "LoadedModel",
    runner: BlockRunner,
    batches: Sequence[torch.Tensor],
    drop: bool,
    reporter: Reporter,
) -> Choice:
    """Measures the options of each layer, and chooses among them; every rank calls it, and gets the same.

    Args:
        job: What was asked for.
        model: This rank's part of the model.
        runner: Computes its blocks.
        batches: The calibration batches of this data-parallel rank.
        drop: Free the weights of each block when the walk leaves it.
        reporter: Follows it.
    """
    groups = _groups(job)
    ways = ways_to_quantize(groups, job.quantization, job.decoder)
    learner = ErrorLearner(runner, model.parallelism, Stream(batches), ways)
    reporter.say(f"choosing an algorithm for each of {len(groups)} layers: the calibration data goes through them once")
    walk(model, runner, learner, [learner.stream], [], drop=drop, reporter=reporter)
    everyones: list[Any] = [dict(learner.errors)] * dist.get_world_size()
    dist.all_gather_object(everyones, dict(learner.errors))
    # Of the ranks that have measured a layer the first counts: its sums may differ from the others' in the last bit.
    errors = {name: measured for theirs in reversed(everyones) for name, measured in theirs.items()}
    choice = Choice(*choice_of(groups, errors, job.quantization), errors)
    _say(choice, reporter)
    return choice


def choose_again(job: Job, choice: Choice, recovery: float, reporter: Reporter) -> Choice | None:
    """Chooses more bits where a choice has missed the recovery that is aimed at.

    Args:
        job: What was asked for.
        choice: What was tried.
        recovery: What it has reached.
        reporter: Hears of it.

    Returns:
        None where it has reached it, where bits were asked for, or after so many trials that it is given up.
    """
    wanted, record = job.export.min_recovery, choice.record
    if record is None or wanted is None or job.quantization.effective_bits is not None or recovery >= wanted:
        return None
    tried = (*record.tried, (record.effective_bits, recovery))
    if len(tried) == _TRIALS:
        return None
    reporter.say(f"recovery {recovery:.4f} with {record.effective_bits:.2f} bits, at least {wanted:g} required")
    most_error = error_for(record.error, recovery, wanted)
    algorithms, further = choice_of(_groups(job), choice.errors, job.quantization, most_error)
    found = Choice(algorithms, replace(further, tried=tried), choice.errors)
    _say(found, reporter)
    return found


def error_for(error: float, recovery: float, wanted: float) -> float:
    """Returns the predicted error with which a recovery should be reached, given another choice's that misses it.

    Args:
        error: Of that choice.
        recovery: The recovery it reached, which is less than required.
        wanted: At most 1.
    """
    lost = -math.log(max(recovery, sys.float_info.min))
    return error * min(-math.log(wanted) / lost, _LESS)


def _groups(job: Job) -> list[LayerGroup]:
    return layer_groups(job.quantization, job.metadata, job.export.formats, job.calibration_tp, job.unquantized)


def _say(choice: Choice, reporter: Reporter) -> None:
    assert choice.record is not None
    bits, error = choice.record.effective_bits, choice.record.error
    reporter.say(f"chosen: {bits:.2f} bits of a weight on average, predicted error {error:.3g}")


def ways_to_quantize(groups: Sequence[LayerGroup], quantization: QuantizationConfig, decoder: str) -> Ways:
    """Returns what is measured of each group of layers.

    Args:
        groups: What to choose for.
        quantization: What the user asked for.
        decoder: Decoder type of the model, e.g. "llama".
    """
    options = {option for group in groups for option in group.options} - {NO_QUANT}
    own = {option: quantization_of_layer(quantization, option) for option in options}
    ways = {option: Way(rounder_for(its, decoder), algorithm_scheme(its)) for option, its in own.items()}
    return {group.linears: {name: ways[name] for name in group.options if name in ways} for group in groups}


def choice_of(
    groups: Sequence[LayerGroup], errors: Errors, quantization: QuantizationConfig, most_error: float = math.inf
) -> tuple[dict[str, str], MixedPrecision]:
    """Chooses from what was measured: the algorithm of each linear layer, and what the report says.

    Args:
        groups: What to choose for.
        errors: Of each group, by its name and the option; "no_quant" has none.
        quantization: What the user asked for. Without bits on average the fewest are taken.
        most_error: The largest predicted error then.
    """
    costs = {
        group.name: {
            option: Cost(
                0.0 if option == NO_QUANT else errors[group.name][option],
                group.weights * bits_of(option, quantization),
            )
            for option in group.options
        }
        for group in groups
    }
    weights = sum(group.weights for group in groups)
    stops = sweep(costs)
    if quantization.effective_bits is None:
        found = next(stop for stop in stops if stop.error <= most_error)  # the last one has none
    else:
        # A budget that is the least that there is may fall short of it in the last bit.
        found = allocate(costs, quantization.effective_bits * weights * (1 + 1e-9))
    algorithms = {linear: found.options[group.name] for group in groups for linear in group.linears}
    curve = tuple((stop.bits / weights, stop.error) for stop in _thinned(stops))
    return algorithms, MixedPrecision(found.bits / weights, found.error, curve)


def _thinned(stops: Sequence[Allocation]) -> list[Allocation]:
    """At most so many stops, the first and the last among them."""
    step = -(-len(stops) // _POINTS)
    return [*stops[:-1:step], stops[-1]]


def keep_choice(directory: Path, choice: Choice) -> None:
    """Writes a choice into the journal's directory, for a run that goes on."""
    directory.mkdir(exist_ok=True)
    (directory / _FILE).write_text(json.dumps(asdict(choice)), encoding="utf-8")


def kept_choice(directory: Path) -> Choice:
    """Reads what :func:`keep_choice` has written."""
    content = json.loads((directory / _FILE).read_text(encoding="utf-8"))
    return Choice(content["algorithms"], mixed_precision(content["record"]), content["errors"])
