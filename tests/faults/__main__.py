# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.faults`: runs the campaign, prints its table, and fails if there is a problem."""

import argparse
import os
import sys
from pathlib import Path

# Before anything imports PyTorch; commands inherit it.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "NEMO_PTQ_RECORD": "0",
}


def main() -> int:
    """Runs it as the command line says; returns the exit status."""
    from tests.faults.campaign import run, table, write
    from tests.faults.kinds import KINDS

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kind.name for kind in KINDS))
    parser.add_argument("--seed", type=int, default=0, help="chooses the faults")
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of each kind")
    parser.add_argument("--work", type=Path, default=Path("build/faults"), help="goes on with what is there")
    parser.add_argument("--document", type=Path, help="where the table is put in its place, as in docs/reliability.md")
    given = parser.parse_args()
    results = run(given.work.absolute(), given.seed, given.share, given.kinds)
    print(f"\n{table(results)}")
    if given.document:
        write(given.document, results)
    return int(any(result.problems for result in results))


if __name__ == "__main__":
    sys.exit(main())
