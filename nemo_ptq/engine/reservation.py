# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A job owns its output from its first step to its last: no other job writes there, and a failed job tidies up."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist

from nemo_ptq.checkpoint.staging import Staging, begin, discard, reserved
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.errors import PtqError, RecoveryError, VerificationError
from nemo_ptq.export.leftover import Leftover, find_leftover, finished_blocks
from nemo_ptq.job import Job
from nemo_ptq.plan.rules.paths import output_can_be_renamed, output_is_free


@contextmanager
def reserve(job: Job, reporter: Reporter, resumes: bool = False) -> Iterator[Staging]:
    """Reserves a job's output, and gives it a staging directory, during a ``with`` block in one process.

    If the block fails, its finished blocks are kept for another run to continue, unless the result was rejected; the
    rest is removed.

    Args:
        job: The job.
        reporter: Told what is left behind.
        resumes: Whether the job may continue an earlier run.

    Raises:
        PtqError: If another process makes the output, or something is in the way that was not when the job was checked.
    """
    with reserved(job.output) as is_alone:
        if not is_alone:
            reporter.warn(f"the file system of {job.output} has no locks: start no other job with this path")
        leftover = find_leftover(job.output)
        # These were rules before the job was started: another one may have ended in the meantime.
        problem = output_can_be_renamed(job.output) or output_is_free(job.output, job.export.overwrite)
        if leftover is not None and not resumes:
            problem = problem or leftover.in_the_way_of(job.output)
        if problem is not None:
            raise PtqError(problem)
        staging = begin(job.output, None if leftover is None else leftover.root, is_alone)
        try:
            yield staging
        except (VerificationError, RecoveryError):
            discard(staging)
            raise
        except BaseException:
            if blocks := finished_blocks(staging.root):
                reporter.warn(f"{blocks} finished blocks are kept: {Leftover(staging.root, blocks).ways_on}")
            else:
                discard(staging)
            raise


@contextmanager
def reserve_for_all(job: Job, reporter: Reporter) -> Iterator[tuple[Staging, bool]]:
    """Does what :func:`reserve` does on rank 0, for all ranks, which call it together.

    Yields:
        The staging directory, and whether there are finished blocks in it to go on from.

    Raises:
        PtqError: As :func:`reserve`, on rank 0.
        SystemExit: On the others then: rank 0 says why.
    """
    with ExitStack() as stack:
        answer: list[tuple[Staging, bool] | None] = [None]
        if dist.get_rank() == 0:
            try:
                staging = stack.enter_context(reserve(job, reporter, job.export.resume))
                answer = [(staging, finished_blocks(staging.root) > 0)]
            except BaseException:
                dist.broadcast_object_list(answer, src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        if answer[0] is None:
            sys.exit(1)
        yield answer[0]
