# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Slurm's view of a job: how it ended, which rank failed, and how to end it."""

import re
import time
from dataclasses import dataclass
from typing import Any

from nemo_ptq.errors import PtqError

SUCCESS = "COMPLETED"
CANCELLED = "CANCELLED"
UNKNOWN = "UNKNOWN"
# Slurm's final states, and the user's remedy for each; all others lead to one of these.
# https://slurm.schedmd.com/sacct.html#SECTION_JOB-STATE-CODES
_ADVICE = {
    SUCCESS: "",
    CANCELLED: "",
    "FAILED": "",
    "BOOT_FAIL": "submit it again",
    "DEADLINE": "submit it again with a later deadline",
    "NODE_FAIL": "submit it again, or with run.executor.requeue=true, which leaves that to Slurm",
    "OUT_OF_MEMORY": "give it more with run.executor.mem, or spread the model over more ranks",
    "PREEMPTED": "submit it again, or with run.executor.requeue=true, which leaves that to Slurm",
    "REVOKED": "submit it again",
    "TIMEOUT": "give it more than its limit of run.executor.time={time}",
}
_OF_A_RANK = ("FAILED", "OUT_OF_MEMORY")
_TASK_ENDED = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)[^:]*: (?P<how>.+)$", re.MULTILINE)
_LAUNCH_FAILED = re.compile(
    r"^srun: error: Task launch for \S+ failed on node (?P<node>\S+): (?P<why>.+)$", re.MULTILINE
)
_NODE_FAILED = re.compile(r"^srun: error: Node failure on (?P<node>\S+)$", re.MULTILINE)
_POLL_SECONDS = 2.0
# Polls without an answer before a job is given up: the accounting may lag, and a controller may restart.
_PATIENCE = 30
_LOG_LINES = 15
_LOG_BYTES = 1 << 18


@dataclass(frozen=True)
class SlurmJob:
    """A job that NeMo-Run has submitted.

    Attributes:
        id: Slurm's number of it.
        name: NeMo-Run's name of it.
        slurm_name: Slurm's name of it, which is in the names of its logs.
        directory: Where its logs are.
        tunnel: NeMo-Run's tunnel to a machine with Slurm's commands.
        time: Its time limit.
    """

    id: str
    name: str
    slurm_name: str
    directory: str
    tunnel: Any
    time: str

    def cancel(self) -> None:
        """Has Slurm end the job."""
        self._ask(f"scancel {self.id}")

    def wait(self) -> str:
        """Waits until the job has ended, and returns its state: one of Slurm's, or :data:`UNKNOWN`.

        `sacct` knows how it ended, and `squeue` that it has not, where the accounting lags or the job starts again.
        """
        unanswered = 0
        while unanswered < _PATIENCE:
            queued = self._ask(f"squeue -h -j {self.id} -o %T")
            recorded = self._ask(f"sacct -nXP -j {self.id} -o State").partition(" ")[0]  # "CANCELLED by 1000"
            if queued in ("", *_ADVICE) and recorded in _ADVICE:
                return recorded
            unanswered = 0 if queued else unanswered + 1
            time.sleep(_POLL_SECONDS)
        return UNKNOWN

    def describe(self, state: str) -> str:
        """Says how the job ended, which rank failed, and how its log ends.

        Args:
            state: The result of :meth:`wait`.
        """
        who = f"job {self.name} (Slurm's {self.id})"
        if state == UNKNOWN:
            return (
                f"whether {who} succeeded is not known: neither sacct nor squeue tell; its logs are in {self.directory}"
            )
        report_path, report = self._read(f"sbatch_{self.slurm_name}_{self.id}.out")
        path, log = self._read(f"log-{self.slurm_name}_{self.id}_*.out")
        failed_node = _NODE_FAILED.search(report)
        rank, where = first_failure(report) if state in _OF_A_RANK else (None, "")
        if failed_node and not where:
            where = f" on node {failed_node['node']}"
        advice = _ADVICE[state].format(time=self.time)
        ending = "was cancelled" if state == CANCELLED else f"ended as {state}{where}"
        lines = lines_of(log, rank)
        if not lines:
            path, lines = report_path, report.splitlines()
        if not lines:
            end = f"it left no log in {self.directory}: do all nodes see this directory (run.executor.job_dir)?"
        else:
            end = "\n".join([f"the last lines of its log, {path}:", *(f"  {line}" for line in lines[-_LOG_LINES:])])
        return f"{who} {ending}{f' ({advice})' if advice else ''}; {end}"

    def _ask(self, command: str) -> str:
        """The first line that a command prints on the cluster, "" where it fails."""
        result = _run(self.tunnel, f"timeout 60 {command}")
        return result.stdout.strip().partition("\n")[0] if result.return_code == 0 else ""

    def _read(self, pattern: str) -> tuple[str, str]:
        """The path and the end of the newest file of a pattern in the job's directory."""
        path = self._ask(f"ls -1t {self.directory}/{pattern}")
        if not path:
            return "", ""
        return path, _run(self.tunnel, f"tail -c {_LOG_BYTES} {path}").stdout


def _run(tunnel: Any, command: str) -> Any:
    """Runs a command through a tunnel, and leaves the terminal's input alone."""
    return tunnel.run(command, warn=True, in_stream=False)


def first_failure(report: str) -> tuple[int | None, str]:
    """Finds the rank that failed first in srun's report, and describes the failure.

    Args:
        report: The output of srun. It ends the other ranks once one has failed, and reports these later.

    Example:
        >>> first_failure("srun: error: n2: task 3: Exited with exit code 1")
        (3, ' on rank 3, on node n2, which exited with exit code 1')
    """
    launch = _LAUNCH_FAILED.search(report)
    if launch:
        return None, f" on node {launch['node']}, where srun could not start its processes ({launch['why'].strip()})"
    failure = _TASK_ENDED.search(report)
    if failure is None:
        return None, ""
    how = failure["how"].strip()
    verb = "exited" + how.removeprefix("Exited") if how.startswith("Exited") else f"was ended: {how}"
    return int(failure["rank"]), f" on rank {failure['rank']}, on node {failure['node']}, which {verb}"


def lines_of(log: str, rank: int | None) -> list[str]:
    """Returns the lines of a log that a rank wrote, without srun's label; all of them, with labels, if `rank` is None.

    Args:
        log: Lines with labels, as `srun --label` writes them, e.g. "03: text".
        rank: The rank.
    """
    if rank is None:
        return log.splitlines()
    label = re.compile(rf"^\s*0*{rank}: (?!slurmstepd)(.*)$", re.MULTILINE)
    return label.findall(log)


def check_reachable(tunnel: Any, *, is_followed: bool) -> None:
    """Checks that jobs can be submitted through a tunnel, and followed.

    Args:
        tunnel: NeMo-Run's.
        is_followed: Whether the job will be waited for, which needs Slurm's accounting.

    Raises:
        PtqError: If not.
    """
    if _run(tunnel, "command -v sbatch").return_code != 0:
        raise PtqError(
            "run.executor=slurm needs Slurm's commands, and there is no sbatch on PATH: run it on a login node of the "
            "cluster, or name one with run.executor.tunnel=ssh://user@host"
        )
    answer = _run(tunnel, "timeout 60 sacct -nX -S now")
    if is_followed and answer.return_code != 0:
        reason = (answer.stderr.strip().splitlines() or ["it gives no answer"])[-1]
        raise PtqError(
            f"sacct, which tells how a job ends, does not work here ({reason}): add --detach to submit the job all the "
            "same, and follow it with squeue and its log"
        )
