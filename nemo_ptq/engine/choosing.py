# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Algorithm "auto": a walk of its own that measures what each option would change, and the choice among them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from nemo_ptq.report.records import MixedPrecision

if TYPE_CHECKING:  # builds Megatron's models, which the decisions here can do without
    from nemo_ptq.checkpoint.loading import LoadedModel

# In the journal's directory: another choice would not fit the blocks that are written.
_FILE = "choice.json"
# Points of the curve that are kept.
_POINTS = 64


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        algorithms: Name of the algorithm of each linear layer, "no_quant" among them, by Megatron's name of the layer.
        record: What the report says of it; None where the calibration came from a file.
    """

    algorithms: Mapping[str, str]
    record: MixedPrecision | None


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
    groups = layer_groups(job.quantization, job.metadata, job.export.formats, job.calibration_tp, job.unquantized)
    ways = ways_to_quantize(groups, job.quantization, job.decoder)
    learner = ErrorLearner(runner, model.parallelism, Stream(batches), ways)
    reporter.say(f"choosing an algorithm for each of {len(groups)} layers: the calibration data goes through them once")
    walk(model, runner, learner, [learner.stream], [], drop=drop, reporter=reporter)
    everyones: list[Any] = [dict(learner.errors)] * dist.get_world_size()
    dist.all_gather_object(everyones, dict(learner.errors))
    # Of the ranks that have measured a layer the first counts: its sums may differ from the others' in the last bit.
    errors = {name: measured for theirs in reversed(everyones) for name, measured in theirs.items()}
    algorithms, record = choice_of(groups, errors, job.quantization)
    reporter.say(f"chosen: {record.effective_bits:.2f} bits of a weight on average, predicted error {record.error:.3g}")
    return Choice(algorithms, record)


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
    groups: Sequence[LayerGroup], errors: Mapping[str, Mapping[str, float]], quantization: QuantizationConfig
) -> tuple[dict[str, str], MixedPrecision]:
    """Chooses from what was measured: the algorithm of each linear layer, and what the report says.

    Args:
        groups: What to choose for.
        errors: Of each group, by its name and the option; "no_quant" has none.
        quantization: What the user asked for.
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
    assert quantization.effective_bits is not None
    # A budget that is the least that there is may fall short of it in the last bit.
    found = allocate(costs, quantization.effective_bits * weights * (1 + 1e-9))
    algorithms = {linear: found.options[group.name] for group in groups for linear in group.linears}
    curve = tuple((stop.bits / weights, stop.error) for stop in _thinned(sweep(costs)))
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
    record = content["record"]
    curve = tuple((bits, error) for bits, error in record["curve"])
    return Choice(content["algorithms"], MixedPrecision(record["effective_bits"], record["error"], curve))
