# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m nemo_ptq.launch.agent`: torchrun for `nemo-ptq run`, which leaves the last message to the ranks.

torchrun itself ends with a traceback of its own when a rank has failed, and leaves its directory of logs behind.
"""

import logging
import signal
import sys
import tempfile
from collections.abc import Sequence

from nemo_ptq.console.interrupts import end_at_once


def ending(status: int, rank: int) -> str | None:
    """Says how a rank ended that could not report it itself; None if it could.

    Args:
        status: As in subprocess: negative where a signal has ended the rank.
        rank: Its number.
    """
    if status >= 0:
        return None
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    advice = "; if nobody has killed it, the machine has run out of memory" if name == "SIGKILL" else ""
    return f"Error: rank {rank} was ended by {name}{advice}"


def main(arguments: Sequence[str]) -> int:
    """Runs torchrun.

    Args:
        arguments: Its command line.

    Returns:
        The exit status: that of the rank that failed first, 1 if a signal has ended it.
    """
    end_at_once()  # until torchrun listens to signals itself
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # It would log every step that it takes, and each rank that has failed.
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="nemo_ptq_") as logs:
        try:
            torchrun([f"--log-dir={logs}", *arguments])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if said := ending(failure.exitcode, rank):
                print(said, file=sys.stderr, flush=True)
            return max(failure.exitcode, 1)
        except SignalException as error:
            print(f"Error: ended by {error.sigval.name}", file=sys.stderr, flush=True)
            return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
