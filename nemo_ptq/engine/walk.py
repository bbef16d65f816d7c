# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""One job's walk through the blocks of its model: its visitors, and how an interrupted walk is continued."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch

from nemo_ptq.calibration.fingerprint import Fingerprint
from nemo_ptq.calibration.nearest_learner import NearestLearner
from nemo_ptq.calibration.observing import State, TokenCounts
from nemo_ptq.calibration.pipeline import BlockVisitor, Learner, walk
from nemo_ptq.calibration.rounding_learner import RoundingLearner
from nemo_ptq.calibration.streams import BlockRunner, Stream
from nemo_ptq.checkpoint.blocks import Block
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.journal import Journal, Progress
from nemo_ptq.export.exports import Exports
from nemo_ptq.report.measure import Measurement
from nemo_ptq.report.metrics import as_json, from_json
from nemo_ptq.verify.evaluate import DocumentScore

WALK_STEPS = ("load", "calibrate", "export", "measure")
"""Steps whose parts take turns, block by block."""


class _Timed:
    """Counts a visitor's time as a part of a step."""

    def __init__(self, step: str, visitor: BlockVisitor, reporter: Reporter) -> None:
        self._step, self._visitor, self._reporter = step, visitor, reporter

    def visit(self, index: int, block: Block | None, state: State) -> None:
        """See :meth:`BlockVisitor.visit`."""
        with self._reporter.part(self._step):
            self._visitor.visit(index, block, state)


@dataclass
class JobWalk:
    """The walk of one job on one rank.

    Attributes:
        model: This rank's part of the model.
        runner: Computes its blocks.
        learner: Calibrates them; None if there is a calibration already.
        exports: Writes the formats.
        measurement: Measures what quantization changes.
        fingerprint: Sums up the weights.
        journal: Records the walk's progress.
        reporter: Shows progress.
        state: Calibration state of this rank's blocks so far.
    """

    model: LoadedModel
    runner: BlockRunner
    learner: Learner | None
    exports: Exports
    measurement: Measurement
    fingerprint: Fingerprint
    journal: Journal
    reporter: Reporter
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self, drop: bool, given: Callable[[int], State] | None, resume: bool) -> None:
        """Walks to the end; every rank calls it.

        Args:
            drop: Free the weights of each block when the walk leaves it.
            given: Returns the existing calibration state of a block, by its index; None if there is none.
            resume: Continue where an earlier run was interrupted.
        """
        start = self._resume() if resume else 0
        self.journal.begin()
        walk(
            self.model,
            self.runner,
            self.learner,
            list(self._streams().values()),
            [
                self.fingerprint,
                _Timed("export", self.exports, self.reporter),
                _Timed("measure", self.measurement, self.reporter),
            ],
            drop=drop,
            reporter=self.reporter,
            given=given,
            start=start,
            finished=self._finished,
        )

    @property
    def expert_tokens(self) -> TokenCounts:
        """Tokens that each expert of this rank has seen."""
        return Counter() if self.learner is None else self.learner.counts

    @property
    def nearest(self) -> list[int]:
        """Blocks of this rank that quality "max" has rounded to nearest."""
        return self.learner.nearest if isinstance(self.learner, RoundingLearner | NearestLearner) else []

    def _streams(self) -> dict[str, Stream]:
        named = {
            **({} if self.learner is None else self.learner.streams),
            "reference": self.measurement.reference,
            "quantized": self.measurement.quantized,
        }
        return {name: stream for name, stream in named.items() if stream is not None}

    def _finished(self, index: int, state: State) -> None:
        self.state |= state
        if self.journal.is_due():
            self.exports.sync()
            self.journal.write(self._progress(index + 1))

    def _progress(self, next_block: int) -> Progress:
        hidden = {
            f"{name}.{place}": states
            for name, stream in self._streams().items()
            for place, states in enumerate(stream.hidden)
        }
        notes = {
            "sums": as_json(self.measurement.sums),
            "scores": [asdict(score) for score in self.measurement.scores],
            "fingerprint": self.fingerprint.sums,
            "experts": [[*expert, tokens] for expert, tokens in self.expert_tokens.items()],
            "nearest": self.nearest,
        }
        return Progress(next_block, {**hidden, **_prefixed("state.", self.state)}, notes)

    def _resume(self) -> int:
        """Restores an earlier run's progress; returns the first block that is not finished."""
        progress = self.journal.read()
        for name, stream in self._streams().items():
            places = sum(key.startswith(f"{name}.") for key in progress.tensors)
            stream.hidden = [
                progress.tensors[f"{name}.{place}"].to(self.runner.states_device) for place in range(places)
            ]
        self.state = {
            name.removeprefix("state."): value for name, value in progress.tensors.items() if name.startswith("state.")
        }
        self.measurement.sums = from_json(progress.notes["sums"])
        self.measurement.scores = [DocumentScore(**score) for score in progress.notes["scores"]]
        self.fingerprint.sums = dict(progress.notes["fingerprint"])
        if self.learner is not None:
            self.learner.counts.update({(layer, expert): count for layer, expert, count in progress.notes["experts"]})
        self.nearest.extend(progress.notes["nearest"])
        for index in range(progress.next_block):
            self.exports.skip(index)
        self.reporter.say(f"resuming after {progress.next_block} of {self.model.num_blocks} blocks")
        return progress.next_block


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value.contiguous() for name, value in tensors.items()}
