# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What Slurm says is understood, also when it says nothing. tests/cluster asks a real one."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from nemo_ptq.errors import PtqError
from nemo_ptq.launch import slurm
from nemo_ptq.launch.slurm import SlurmJob, check_reachable, first_failure, lines_of

# As srun of Slurm 22.05 wrote it.
REPORT = """\
srun: error: n2: task 3: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=2.0
srun: error: n2: task 2: Exited with exit code 3
srun: error: n1: tasks 0-1: Exited with exit code 3
"""


@dataclass
class Tunnel:
    """Answers commands by their first words, in turn; the last answer stays."""

    answers: dict[str, list[str | None]]
    asked: list[str] = field(default_factory=list)

    def run(self, command: str, warn: bool, in_stream: bool) -> SimpleNamespace:
        assert warn
        assert not in_stream
        command = command.removeprefix("timeout 60 ")
        self.asked.append(command)
        answers = next((said for words, said in self.answers.items() if command.startswith(words)), [None])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return SimpleNamespace(return_code=int(answer is None), stdout=answer or "", stderr="error: refused\n")


def job(**answers: list[str | None]) -> SlurmJob:
    return SlurmJob(
        "12",
        "ptq",
        "nemo_ptq.ptq",
        "/jobs/ptq",
        Tunnel({name.replace("_", " "): said for name, said in answers.items()}),
        "1:00",
    )


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)


@pytest.mark.parametrize(
    ("queue", "accounting", "state"),
    [
        ([""], ["COMPLETED\n"], "COMPLETED"),
        ([None], ["CANCELLED by 1000\n"], "CANCELLED"),
        (["RUNNING", "COMPLETED"], ["RUNNING", "COMPLETED"], "COMPLETED"),
        (["PENDING", "RUNNING", ""], ["PREEMPTED", "PREEMPTED", "COMPLETED"], "COMPLETED"),  # it was queued again
        (["COMPLETING"] * 100 + [""], [""] * 100 + ["TIMEOUT"], "TIMEOUT"),  # the accounting lags
        ([""], ["", "", "", "FAILED"], "FAILED"),
        ([None], [None], "UNKNOWN"),
        ([None], ["RUNNING"], "UNKNOWN"),  # left so by a cluster that went away
    ],
)
def test_the_job_is_waited_for(queue: list[str | None], accounting: list[str | None], state: str) -> None:
    assert job(squeue=queue, sacct=accounting).wait() == state


def test_the_rank_that_failed_first_is_named() -> None:
    assert first_failure(REPORT) == (3, " on rank 3, on node n2, which exited with exit code 1")
    assert first_failure("srun: error: gpu-01: task 1: Killed\n") == (
        1,
        " on rank 1, on node gpu-01, which was ended: Killed",
    )
    assert first_failure("srun: error: n1: tasks 4-7,9: Exited with exit code 2\n")[0] == 4
    assert first_failure("setup: command not found\n") == (None, "")


def test_a_node_on_which_nothing_started_is_named() -> None:
    report = """\
srun: error: Task launch for StepId=8.1 failed on node n2: Communication connection failure
srun: error: Application launch failed: Communication connection failure
srun: error: n1: task 0: Killed
"""
    assert first_failure(report) == (
        None,
        " on node n2, where srun could not start its processes (Communication connection failure)",
    )


def test_the_lines_of_a_rank() -> None:
    log = " 1: a\n11: b\n01: c\n0: d\n1: slurmstepd-n1: error: *** STEP CANCELLED ***\n1: e: f\n"
    assert lines_of(log, 1) == ["a", "c", "e: f"]
    assert len(lines_of(log, None)) == 6


def test_a_failure_shows_the_log_of_its_rank() -> None:
    failed = job()
    failed.tunnel.answers |= {
        "ls -1t /jobs/ptq/sbatch_nemo_ptq.ptq_12.out": ["/jobs/ptq/sbatch_a_12.out\n"],
        "ls -1t /jobs/ptq/log-nemo_ptq.ptq_12_*.out": ["/jobs/ptq/log-a_12_0.out\nolder\n"],
        "tail -c 262144 /jobs/ptq/sbatch": [REPORT],
        "tail -c 262144 /jobs/ptq/log": ["0: fine\n3: no space left\n"],
    }
    assert failed.describe("FAILED").splitlines() == [
        "job ptq (Slurm's 12) ended as FAILED on rank 3, on node n2, which exited with exit code 1; "
        "the last lines of its log, /jobs/ptq/log-a_12_0.out:",
        "  no space left",
    ]
    assert "ended as TIMEOUT (give it more than its limit of run.executor.time=1:00)" in failed.describe("TIMEOUT")
    assert failed.describe("CANCELLED").splitlines()[1:] == ["  0: fine", "  3: no space left"]


def test_a_job_without_a_log_and_one_whose_end_is_not_known() -> None:
    assert "do all nodes see this directory" in job().describe("FAILED")
    assert "whether job ptq (Slurm's 12) succeeded is not known" in job().describe("UNKNOWN")


def test_a_machine_without_slurm() -> None:
    with pytest.raises(PtqError, match="no sbatch on PATH: run it on a login node"):
        check_reachable(Tunnel({}), is_followed=True)


def test_without_accounting_a_job_is_submitted_but_not_followed() -> None:
    tunnel = Tunnel({"command -v sbatch": ["/usr/bin/sbatch"]})
    with pytest.raises(PtqError, match=r"sacct, .* does not work here \(error: refused\): add --detach"):
        check_reachable(tunnel, is_followed=True)
    check_reachable(tunnel, is_followed=False)
