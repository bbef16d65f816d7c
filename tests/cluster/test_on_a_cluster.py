# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs on a real Slurm: the files are those of a local run, and what goes wrong is told and leaves nothing behind."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from tests.cluster.conftest import QUANTIZATION, Cluster, run_script, wait_until
from tests.conftest import Demo
from tests.engine.test_run import TIMED, run_task
from tests.files import digests
from tests.ranks import run_ranks

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(480)]

PYTHON_LAUNCH = """
import sys
import nemo_run as run
from nemo_ptq import ExportConfig, QuantizationConfig, ptq
from nemo_ptq.launch.executors import slurm
from nemo_ptq.launch.experiment import run_experiment

if __name__ == "__main__":
    checkpoint, data, output, jobs = sys.argv[1:]
    task = run.Partial(
        ptq,
        nemo_checkpoint=checkpoint,
        calibration_tp=2,
        quantization_config=run.Config(QuantizationConfig, calibration_dataset=data, **QUANTIZATION),
        export_config=run.Config(ExportConfig, path=output),
    )
    run_experiment(task, slurm(account="demo", partition="batch", nodes=2, job_dir=jobs), name="from_python")
"""


def ended(command: "subprocess.Popen[str]", seconds: float = 300.0) -> tuple[int, str]:
    """The exit status of a command, and what it printed."""
    try:
        printed, _ = command.communicate(timeout=seconds)
    finally:
        command.kill()
    return command.returncode, printed


def assert_failed(command: "subprocess.Popen[str]", output: Path, *messages: str, status: int = 1) -> None:
    """The command has failed with its messages, and left nothing where it would have written."""
    found, printed = ended(command)
    errors = printed[printed.find("Error: ") :]
    assert found == status, printed
    assert [message for message in messages if message not in errors] == [], errors
    assert list(output.parent.iterdir()) == []


def contents(directory: Path) -> dict[str, Any]:
    """Digests of all files, but of two that hold times and memory; the manifest knows these two as well."""
    manifest = json.loads((directory / "ptq/manifest.json").read_text())
    manifest.pop("sha256", None)
    for name in TIMED:
        manifest["files"].pop(name)
    files = {name: digest for name, digest in digests(directory).items() if name not in {*TIMED, "ptq/manifest.json"}}
    return {**files, "manifest": manifest}


def local_contents(demo: Demo, output: Path, **sizes: int) -> dict[str, Any]:
    """The same of this job on this machine, under the same name."""
    output.rename(output.with_name("cluster"))
    task: dict[str, Any] = {
        "nemo_checkpoint": str(demo.checkpoint),
        "quantization_config": QuantizationConfig(calibration_dataset=str(demo.calibration), **QUANTIZATION),
        "export_config": ExportConfig(str(output)),
        **sizes,
    }
    run_ranks(run_task, sizes.get("calibration_tp", 1) * sizes.get("calibration_pp", 1), task)
    found = contents(output)
    shutil.rmtree(output)
    return found


@pytest.fixture(scope="module", autouse=True)
def overdue(
    cluster: Cluster, demo: Demo, long_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple["subprocess.Popen[str]", Path, str]]:
    """A job with a rank that stands still and a limit of two minutes, which passes while other tests run."""
    output = tmp_path_factory.mktemp("overdue") / "out"
    before = cluster.newest_job()
    command = cluster.nemo(demo, output, **disturbed(long_text), **{"run.executor.time": "00:02:00"})
    try:
        job = cluster.next_job(before)
        cluster.signal_rank(job, 1, "n2", signal.SIGSTOP)
        yield command, output, job
    finally:
        command.kill()


def disturbed(long_text: Path) -> dict[str, object]:
    """Settings of a job that lasts."""
    return {
        "calibration_pp": 2,
        "quantization_config.calibration_dataset": long_text,
        "quantization_config.calibration_dataset_size": 6_000,
        "quantization_config.calibration_seq_len": 128,
        "run.executor.nodes": 2,
    }


def test_nemo_llm_ptq_over_two_nodes(cluster: Cluster, demo: Demo, output: Path) -> None:
    settings = {"calibration_pp": 2, "run.executor.nodes": 2, "run.executor.env_vars.lower_case": "a b"}
    status, printed = ended(cluster.nemo(demo, output, **settings))
    assert status == 0, printed
    assert f"0: {output} is ready" in printed
    assert {"n1", "n2"} == set(cluster.run("scontrol", "show", "hostnames", "n[1-2]").split())
    assert contents(output) == local_contents(demo, output, calibration_pp=2)


def test_python_over_two_nodes_with_a_directory_for_jobs(cluster: Cluster, demo: Demo, output: Path) -> None:
    program, jobs = output.with_name("launch.py"), output.with_name("jobs")
    program.write_text(PYTHON_LAUNCH.replace("**QUANTIZATION", f"**{QUANTIZATION}"))
    arguments = [str(demo.checkpoint), str(demo.calibration), str(output), str(jobs)]
    cluster.run(sys.executable, str(program), *arguments, timeout=300)
    assert list(jobs.rglob("log-*.out"))
    assert contents(output) == local_contents(demo, output, calibration_tp=2)


def test_srun_with_two_tasks_on_each_node(cluster: Cluster, demo: Demo, output: Path) -> None:
    sizes = {"calibration_tp": 2, "calibration_pp": 2}
    flags = {
        "nemo_checkpoint": demo.checkpoint,
        **sizes,
        "quality": QUANTIZATION["quality"],
        "calibration_dataset": demo.calibration,
        "calibration_dataset_size": QUANTIZATION["calibration_dataset_size"],
        "batch_size": QUANTIZATION["calibration_batch_size"],
        "seq_len": QUANTIZATION["calibration_seq_len"],
        "export_path": output,
    }
    srun = ["srun", "--nodes", "2", "--ntasks-per-node", "2", "--kill-on-bad-exit", "--time", "5"]
    command = ["python", "-m", "nemo_ptq.script", *(f"--{name}={value}" for name, value in flags.items())]
    cluster.run(*srun, *command, timeout=300)
    assert contents(output) == local_contents(demo, output, **sizes)


def test_a_detached_job_goes_on_and_can_be_followed(cluster: Cluster, demo: Demo, output: Path) -> None:
    before = cluster.newest_job()
    status, printed = ended(cluster.nemo(demo, output, **{"--detach": None}))
    assert status == 0, printed
    (follow,) = [line for line in printed.splitlines() if "goes on; to see its log: " in line]
    job = cluster.newest_job()
    assert job != before
    wait_until(lambda: cluster.state(job) == "COMPLETED", "its end")
    assert output.is_dir()
    assert f"{output} is ready" in cluster.run(*follow.partition("log: ")[2].split())


def test_a_job_that_exceeds_its_time(cluster: Cluster, overdue: tuple["subprocess.Popen[str]", Path, str]) -> None:
    command, output, job = overdue
    assert_failed(
        command, output, "ended as TIMEOUT (give it more than its limit of run.executor.time=00:02:00)", "resident: "
    )
    assert cluster.state(job) == "TIMEOUT"


def test_a_rank_that_is_killed(cluster: Cluster, demo: Demo, output: Path, long_text: Path) -> None:
    before = cluster.newest_job()
    command = cluster.nemo(demo, output, **disturbed(long_text))
    job = cluster.next_job(before)
    cluster.signal_rank(job, 1, "n2", signal.SIGKILL)
    assert_failed(command, output, f"(Slurm's {job}) ended as FAILED on rank 1, on node n2, which was ended: Killed")
    assert cluster.state(job) == "FAILED"


def test_a_job_that_is_cancelled(cluster: Cluster, demo: Demo, output: Path, long_text: Path) -> None:
    before = cluster.newest_job()
    command = cluster.nemo(demo, output, **disturbed(long_text))
    job = cluster.next_job(before)
    cluster.run("scancel", job)
    assert_failed(command, output, f"(Slurm's {job}) was cancelled")
    assert cluster.state(job).startswith("CANCELLED")


def test_a_command_that_is_interrupted_cancels_its_job(
    cluster: Cluster, demo: Demo, output: Path, long_text: Path
) -> None:
    before = cluster.newest_job()
    command = cluster.nemo(demo, output, **disturbed(long_text))
    job = cluster.next_job(before)
    command.send_signal(signal.SIGINT)
    assert_failed(command, output, f"(Slurm's {job}) was cancelled", status=128 + signal.SIGINT)
    assert cluster.state(job).startswith("CANCELLED")


def test_a_job_that_is_preempted(cluster: Cluster, demo: Demo, output: Path, long_text: Path) -> None:
    before = cluster.newest_job()
    command = cluster.nemo(demo, output, **disturbed(long_text))
    job = cluster.next_job(before)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    )
    assert_failed(command, output, f"(Slurm's {job}) ended as PREEMPTED (submit it again")
    assert cluster.state(job) == "PREEMPTED"
    wait_until(lambda: cluster.state(urgent.strip()) == "COMPLETED", "the urgent job")


def test_a_job_that_slurm_refuses(cluster: Cluster, demo: Demo, output: Path) -> None:
    status, printed = ended(cluster.nemo(demo, output, **{"run.executor.partition": "batsch"}))
    assert status == 1, printed
    assert "Error: the job was not submitted: sbatch: error: invalid partition specified: batsch" in printed


def test_a_node_that_goes_down(cluster: Cluster, demo: Demo, output: Path, long_text: Path) -> None:
    before = cluster.newest_job()
    command = cluster.nemo(demo, output, **disturbed(long_text))
    job = cluster.next_job(before)
    cluster.wait_for_walk(job)
    try:
        run_script("kill", "n2")
        assert_failed(command, output, f"(Slurm's {job}) ended as NODE_FAIL on node n2 (submit it again")
        assert cluster.state(job) == "NODE_FAIL"
    finally:
        run_script("boot", "n2")
    wait_until(lambda: cluster.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").split() == ["idle"] * 2, "the node")
