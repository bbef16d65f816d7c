# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The cluster that the tests of this directory share, and the commands that they give it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.staging import begin
from tests.conftest import Demo

SCRIPT = Path(__file__).parent / "cluster.sh"
CONFIGURATION = "/run/nemo_ptq_cluster/slurm.conf"
# What keeps a job small; `options` turns it into arguments of `nemo llm ptq`.
QUANTIZATION = {
    "quality": "fast",
    "calibration_dataset_size": 16,
    "calibration_batch_size": 8,
    "calibration_seq_len": 32,
}


def wait_until(condition: Callable[[], object], what: str, seconds: float = 240.0) -> None:
    """Waits for a condition, and fails if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come in {seconds:g} s"
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """Commands for the cluster.

    Attributes:
        home: NeMo-Run's home, which all nodes see.
    """

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """For commands on the login node, and what sbatch hands on to the jobs."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {**os.environ, "PATH": path, "SLURM_CONF": CONFIGURATION, "NEMORUN_HOME": str(self.home)}

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """Starts a command; what it prints can be read from its `stdout`."""
        return subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def nemo(self, demo: Demo, output: Path, **settings: object) -> "subprocess.Popen[str]":
        """Starts `nemo llm ptq` for the demo's model on the cluster."""
        settings = {
            "nemo_checkpoint": demo.checkpoint,
            "quantization_config.calibration_dataset": demo.calibration,
            **{f"quantization_config.{name}": value for name, value in QUANTIZATION.items()},
            "export_config.path": output,
            "run.executor": "slurm",
            "run.executor.time": "00:05:00",
            **settings,
        }
        flags = [name for name, value in settings.items() if value is None]
        return self.start(
            "nemo", "llm", "ptq", *flags, *(f"{name}={value}" for name, value in settings.items() if value is not None)
        )

    def run(self, *command: str, timeout: float = 120.0) -> str:
        """Runs a command and returns what it prints; it must succeed."""
        process = self.start(*command)
        printed, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, printed
        return printed

    def newest_job(self) -> str:
        """The number of the job that was submitted last."""
        return self.run("squeue", "-h", "-t", "all", "-S", "-i", "-o", "%i").split()[0]

    def state(self, job: str) -> str:
        """What the accounting says of a job."""
        return self.run("sacct", "-nXP", "-j", job, "-o", "State").strip()

    def next_job(self, before: str) -> str:
        """Waits until a job runs that was submitted after another, and returns its number."""
        wait_until(lambda: self.newest_job() != before, "a job")
        job = self.newest_job()
        wait_until(lambda: "RUNNING" in self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T"), "its start")
        return job

    def log(self, job: str) -> str:
        """What the ranks of a job have written."""
        return "".join(log.read_text() for log in self.home.rglob(f"log-*_{job}_*.out"))

    def process_of_rank(self, job: str, rank: int, node: str) -> int | None:
        """The Python process of a rank, None if it does not run."""
        found = subprocess.run(["ip", "netns", "pids", f"nemo_ptq_{node}"], capture_output=True, text=True, check=True)
        wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=1"}
        for process in map(int, found.stdout.split()):
            try:
                variables = set(Path(f"/proc/{process}/environ").read_text().split("\0"))
                program = Path(f"/proc/{process}/comm").read_text()
            except OSError:
                continue  # it has just ended
            if wanted <= variables and program.startswith("python"):
                return process
        return None

    def wait_for_walk(self, job: str) -> None:
        """Waits until the ranks of a job begin to walk through their model."""
        wait_until(lambda: re.search(r"^0: resident: ", self.log(job), re.MULTILINE), "the walk")

    def signal_rank(self, job: str, rank: int, node: str, number: signal.Signals) -> None:
        """Sends a signal to a rank that is calibrating."""
        self.wait_for_walk(job)
        process = self.process_of_rank(job, rank, node)
        assert process is not None
        os.kill(process, number)


def run_script(*arguments: str) -> None:
    """Runs cluster.sh; what it says on standard error is the reason of a failure."""
    result = subprocess.run([str(SCRIPT), *arguments], stderr=subprocess.PIPE, text=True, timeout=200)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, which is gone afterwards."""
    try:
        run_script("up")
        yield Cluster(tmp_path_factory.mktemp("shared"))
    finally:
        run_script("down")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a job writes, with what a killed run before it has left there."""
    output = tmp_path / "exports" / "out"
    output.parent.mkdir()
    (begin(output).files / "rank0.safetensors").touch()
    return output


@pytest.fixture(scope="session")
def long_text(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data that lasts for half a minute, so that a job can be disturbed."""
    file = tmp_path_factory.mktemp("data") / "long.jsonl"
    lines = demo.calibration.read_text().splitlines(keepends=True)
    file.write_text("".join((lines * (6_000 // len(lines) + 1))[:6_000]))
    return file
