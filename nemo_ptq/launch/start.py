# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""From a checked job to the engine, on every rank: the first messages, and the record of the run."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_ptq.calibration.datasets import check_available
from nemo_ptq.console.output import CANNOT_WRITE, NO_ROOM
from nemo_ptq.console.quiet import quiet_imports
from nemo_ptq.console.text import printable
from nemo_ptq.errors import PtqError
from nemo_ptq.job import Job
from nemo_ptq.parallel.environment import read_launch
from nemo_ptq.parallel.parent import end_with_parent
from nemo_ptq.tracking import runs
from nemo_ptq.tracking.trackers import Tracker, open_tracker, without_credentials

# Set to 0, it leaves no record of runs.
RECORD_VARIABLE = "NEMO_PTQ_RECORD"


def start(job: Job) -> None:
    """Runs a job on this rank; all ranks of the job call it.

    Raises:
        PtqError: If the job cannot be done for a reason that the user can correct.
    """
    end_with_parent()
    launch = read_launch()
    if job.reads_data:
        check_available(job.quantization.data_sources)  # before torch and NeMo, which take their time
    if not launch.is_first:
        _run(job, launch.world_size)
        return
    print(f"reading {printable(job.checkpoint)}", flush=True)
    with _recorded(job, launch.world_size):
        _run(job, launch.world_size)


def _run(job: Job, world_size: int) -> None:
    # Imports torch: only a job that can run waits for it, and for Megatron and NeMo only one that runs a model.
    from nemo_ptq.engine.reexport import is_possible, run_reexport

    try:
        if is_possible(job, world_size):
            run_reexport(job)
            return
        with quiet_imports():
            from nemo_ptq.engine.run import run_job
        run_job(job)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        place = error.filename or job.output
        way_out = "free some, or choose" if error.errno in NO_ROOM else "choose"
        raise PtqError(f"{place} cannot be written: {error.strerror}; {way_out} another directory") from error


@contextmanager
def _recorded(job: Job, world_size: int) -> Iterator[None]:
    """Records the run inside a ``with`` block, and sends the record to the tracker that the user named."""
    run, start = runs.begin(job, world_size), time.perf_counter()
    tracker = open_tracker(job.tracking, run) if job.tracking else None
    _keep(run)
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        ended = runs.end(run, time.perf_counter() - start, failure)
        _keep(ended)
        if tracker is not None:
            _finish(tracker, ended)


def _keep(run: runs.Run) -> None:
    """Writes the record. A failure here does not fail the job."""
    if os.environ.get(RECORD_VARIABLE) != "0":
        try:
            runs.write(run)
        except OSError as error:
            print(
                f"warning: this run is not recorded: {error}; set NEMORUN_HOME, or {RECORD_VARIABLE}=0", file=sys.stderr
            )


def _finish(tracker: Tracker, run: runs.Run) -> None:
    try:
        tracker.finish(run)
    except Exception as error:  # each library raises its own, and the export is there
        print(f"warning: the figures did not reach the tracker: {without_credentials(str(error))}", file=sys.stderr)
