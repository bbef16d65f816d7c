# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How long a job takes to start: from the command to the task's first line, for each way, and then to import.

Each job is ended as soon as the line is there; what it would import next is imported in a process of its own. Run it
from the repository, after `make checkpoint`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo import build

FIRST_LINE = "reading "
BIN = Path(sys.executable).parent
WAYS = {
    "nemo-ptq run": ["nemo-ptq", "run"],
    "nemo-ptq run, 2 ranks": ["nemo-ptq", "run", "calibration_tp=2"],
    "nemo-ptq run, run.executor=local": ["nemo-ptq", "run", "run.executor=local"],
    "nemo llm ptq": ["nemo", "llm", "ptq"],
    "nemo llm ptq, run.executor=local": ["nemo", "llm", "ptq", "run.executor=local"],
}


def seconds_to_first_line(command: list[str], directory: str) -> float:
    """Starts a command and returns the seconds until its task says something.

    Args:
        command: The command, without the job's own arguments.
        directory: For everything that it writes.

    Raises:
        RuntimeError: If it ends before.
    """
    job = [f"nemo_checkpoint={build.CHECKPOINT}", f"export_config.path={directory}/out"]
    data = f"quantization_config.calibration_dataset={build.CALIBRATION}"
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NEMORUN_HOME": directory}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, *job, data],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if FIRST_LINE in line:
                return time.perf_counter() - start
    finally:
        process.terminate()
        process.communicate()
    raise RuntimeError("".join(lines))


IMPORTS = {
    "torch": "import torch",
    "and what a job imports of Megatron": "import nemo_ptq.engine.run",
    "and transformers' tokenizers": "import nemo_ptq.engine.run; from nemo_ptq import pretrained; "
    "pretrained.import_transformers().PreTrainedTokenizerFast",
}


def processor_seconds(statement: str) -> float:
    """Returns the processor time of a process that runs a statement."""
    timed = f"import time; {statement}; print(time.process_time())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", timed], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints two tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print("| command | seconds, median | range |\n|---|--:|--:|")
    for name, command in WAYS.items():
        with tempfile.TemporaryDirectory() as directory:
            times = sorted(seconds_to_first_line(command, directory) for _ in range(repeats))
        print(f"| {name} | {statistics.median(times):.1f} | {times[0]:.1f} to {times[-1]:.1f} |", flush=True)
    print("\n| imports | processor seconds, median | range |\n|---|--:|--:|")
    for name, statement in IMPORTS.items():
        times = sorted(processor_seconds(statement) for _ in range(repeats))
        print(f"| {name} | {statistics.median(times):.1f} | {times[0]:.1f} to {times[-1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
