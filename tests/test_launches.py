# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The five documented ways to launch a job, as a user types them: all write the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.tracking.runs import SUCCEEDED, read_runs
from tests.conftest import Demo
from tests.engine.test_run import TIMED
from tests.files import digests
from tests.ranks import _free_port

BIN = Path(sys.executable).parent
SAMPLES = "32"
Launch = Callable[[Demo, Path, Path], None]
PYTHON_LAUNCH = """
import sys
import nemo_run as run
from nemo_ptq import ExportConfig, QuantizationConfig, ptq

if __name__ == "__main__":
    checkpoint, data, samples, output = sys.argv[1:]
    task = run.Partial(
        ptq,
        nemo_checkpoint=checkpoint,
        calibration_tp=2,
        quantization_config=run.Config(
            QuantizationConfig, quality="fast", calibration_dataset=data, calibration_dataset_size=int(samples)
        ),
        export_config=run.Config(ExportConfig, path=output),
    )
    run.run(task, executor=run.LocalExecutor(launcher="torchrun", ntasks_per_node=2), detach=False)
"""


def start(command: list[str], home: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NEMORUN_HOME": str(home), **variables}
    del environment["NEMO_PTQ_RECORD"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: "subprocess.Popen[str]") -> None:
    for process in processes:
        output, _ = process.communicate()  # a busy machine takes what it takes; the test's own limit is pytest's
        assert process.returncode == 0, output


def arguments(demo: Demo, output: Path) -> list[str]:
    values = {
        "nemo_checkpoint": demo.checkpoint,
        "calibration_tp": 2,
        "quantization_config.quality": "fast",
        "quantization_config.calibration_dataset": demo.calibration,
        "quantization_config.calibration_dataset_size": SAMPLES,
        "export_config.path": output,
    }
    return [f"{name}={value}" for name, value in values.items()]


def nemo_command(demo: Demo, output: Path, home: Path) -> None:
    executor = ["run.executor=torchrun", "run.executor.ntasks_per_node=2"]
    finish(start(["nemo", "llm", "ptq", *arguments(demo, output), *executor], home))


def nemo_ptq_run(demo: Demo, output: Path, home: Path) -> None:
    finish(start(["nemo-ptq", "run", *arguments(demo, output)], home))


def script(demo: Demo, output: Path) -> list[str]:
    flags = {"nemo_checkpoint": demo.checkpoint, "calibration_tp": 2, "export_path": output}
    short = ["-calib_ds", str(demo.calibration), "-calib_size", SAMPLES, "--quality", "fast"]
    return ["-m", "nemo_ptq.script", *(f"--{name}={value}" for name, value in flags.items()), *short]


def torchrun(demo: Demo, output: Path, home: Path) -> None:
    finish(start(["torchrun", "--nproc_per_node", "2", *script(demo, output)], home))


def srun(demo: Demo, output: Path, home: Path) -> None:
    """Two tasks with the variables that srun gives them."""
    common = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "MASTER_PORT": str(_free_port())}
    finish(
        *(
            start(
                [sys.executable, *script(demo, output)], home, **common, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)
            )
            for task in range(2)
        )
    )


def python(demo: Demo, output: Path, home: Path) -> None:
    program = home / "launch.py"
    program.write_text(PYTHON_LAUNCH)
    values = [str(demo.checkpoint), str(demo.calibration), SAMPLES, str(output)]
    finish(start([sys.executable, str(program), *values], home))


def what_must_be_equal(output: Path) -> dict[str, Any]:
    """Digests of all files, but of two that hold times and memory: of the report's JSON everything else is compared."""
    manifest = json.loads((output / "ptq/manifest.json").read_text())
    report = json.loads((output / "ptq/report.json").read_text())
    steps = [step["name"] for step in report.pop("steps")]
    files = {name: digest for name, digest in digests(output).items() if name not in {*TIMED, "ptq/manifest.json"}}
    del manifest["sha256"]  # which covers those of these two
    for name in TIMED:
        manifest["files"].pop(name, None)
    return {**files, "manifest": manifest, "report": report, "steps": steps}


# Each process imports NeMo, and takes long to start.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "launches",
    [
        (nemo_ptq_run, srun),  # `make demo` runs the nemo command
        pytest.param((nemo_command, nemo_ptq_run, torchrun, python), marks=pytest.mark.slow),
    ],
)
def test_all_launches_write_the_same_bytes(launches: Sequence[Launch], demo: Demo, tmp_path: Path) -> None:
    written = []
    for launch in launches:
        home, output = tmp_path / launch.__name__, tmp_path / "out"
        home.mkdir()
        launch(demo, output, home)
        written.append(what_must_be_equal(output))
        (record,) = read_runs(home)
        assert (record.state, record.path, record.world_size) == (SUCCEEDED, str(output), 2)
        assert record.id.startswith("ptq_" if launch is nemo_command else "direct_")
        output.rename(home / "out")
    for launch, files in zip(launches[1:], written[1:], strict=True):
        different = {name for name in files.keys() | written[0].keys() if files.get(name) != written[0].get(name)}
        assert different == set(), launch.__name__
