# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The main job as a script for torchrun and srun, with the flags of NeMo's `scripts/llm/ptq.py`.

torchrun --nproc_per_node 2 -m nemo_ptq.script --nemo_checkpoint=CKPT --calibration_tp=2 --export_path=OUT
srun --nodes 2 --ntasks-per-node 8 python -m nemo_ptq.script --calibration_tp=8 --calibration_pp=2 ...
"""

from nemo_ptq.safe_path import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()  # before anything else is imported

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_ptq.console.interrupts import end_at_once
from nemo_ptq.console.output import written_output
from nemo_ptq.console.text import printable, shortened
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
        lines = [f"Error: {in_flags(problem)}" for problem in problems]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        _leave_word("\n".join(lines))
    else:
        time.sleep(2 * _PATIENCE)


def _leave_word(message: str) -> None:
    """Tells torchrun why this rank ends, for the table that it prints last."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}), encoding="utf-8")


def _has_lost_a_peer(error: Exception) -> bool:
    """Whether a rank fails since another has: torch then says that a connection was closed."""
    is_of_torch = type(error).__module__.startswith("torch.distributed")  # DistBackendError and its like
    return is_of_torch or (isinstance(error, RuntimeError) and "Connection" in str(error))


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
        print(f"Error: {shortened(printable(error))}", file=sys.stderr, flush=True)
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
        line = f"Error on rank {launch.rank}: {shortened(printable(error))}"
        print(line, file=sys.stderr, flush=True)
        _leave_word(line)
        return front.FAILED
    except Exception as error:
        if launch.world_size > 1 and _has_lost_a_peer(error):
            # The one that failed has said why, and the launcher ends us now: a traceback would hide its line.
            time.sleep(_PATIENCE)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
