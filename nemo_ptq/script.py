# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The main job as a script for torchrun and srun, with the flags of NeMo's `scripts/llm/ptq.py`.

torchrun --nproc_per_node 2 -m nemo_ptq.script --nemo_checkpoint=CKPT --calibration_tp=2 --export_path=OUT
srun --nodes 2 --ntasks-per-node 8 python -m nemo_ptq.script --calibration_tp=8 --calibration_pp=2 ...
"""

from nemo_ptq.safe_path import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()  # before anything else is imported

import sys
import time
from collections.abc import Sequence

from nemo_ptq.console.interrupts import end_at_once
from nemo_ptq.console.output import written_output
from nemo_ptq.console.text import printable
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.launch import front
from nemo_ptq.launch.flags import in_flags, read_flags
from nemo_ptq.launch.start import start
from nemo_ptq.parallel.environment import Launch, read_launch
from nemo_ptq.plugins import load_plugins

# Seconds that other nodes leave rank 0 for its report: a launcher ends all ranks as soon as one exits.
_PATIENCE = 10.0


def _report(problems: Sequence[str], launch: Launch) -> None:
    """Prints problems once, although all ranks find them."""
    if launch.local_rank == 0:
        if not launch.is_first:
            # Normally rank 0 found the same and ends us now; otherwise it is this node's own problem.
            time.sleep(_PATIENCE)
        for problem in problems:
            print(f"Error: {in_flags(problem)}", file=sys.stderr, flush=True)
    else:
        time.sleep(2 * _PATIENCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script on this rank.

    Args:
        arguments: The command line; None takes this process's.

    Returns:
        The exit status: 0, 1 if the job failed, 2 if the command line is wrong.
    """
    try:
        launch = read_launch()
    except PtqError as error:
        print(f"Error: {printable(error)}", file=sys.stderr, flush=True)
        return front.WRONG
    if arguments is None:
        end_at_once(speaks=launch.world_size == 1)
    try:
        load_plugins()
        task, problems = read_flags(sys.argv[1:] if arguments is None else arguments)
        launcher = launch.launcher or "torchrun"
        job = front.check(task, problems, world_size=launch.world_size, launcher=launcher, speaks=launch.is_first)
    except front.Planned as planned:
        return 0 if planned.plan.ok else front.FAILED
    except ConfigError as error:
        _report(front.problems_of(error), launch)
        return front.WRONG
    try:
        with written_output():
            start(job)
    except PtqError as error:
        print(f"Error on rank {launch.rank}: {printable(error)}", file=sys.stderr, flush=True)
        return front.FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
