# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A job that `kill -9` ends at any moment leaves nothing that looks finished, and goes on to the same bytes."""

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Demo
from tests.engine.test_resume import impatient
from tests.engine.test_run import TIMED, arguments, run_task
from tests.files import digests
from tests.ranks import RankFailed, run_ranks

KILLS = 20
# They repeat the arguments, one of which says that the run was resumed.
REPEATS_ARGUMENTS = {"ptq/manifest.json", "ptq/README.md"}


def seconds_of(task: dict[str, Any]) -> float:
    start = time.perf_counter()
    with impatient():
        run_task(task)
    return time.perf_counter() - start


def run_until_killed(task: dict[str, Any], seconds: float) -> None:
    """Runs a job that is killed after some seconds, if it has not ended."""
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    with impatient():
        run_task(task)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layerwise", [True, False], ids=["layer-wise", "resident"])
def test_a_job_killed_at_a_random_moment_goes_on_to_the_same_bytes(layerwise: bool, demo: Demo, tmp_path: Path) -> None:
    def task(output: Path, resume: bool = False) -> dict[str, Any]:
        export = {"export_format": ["trtllm", "hf"], "resume": resume}
        return arguments(demo, output, algorithm="int4_awq", quantization={"layerwise": layerwise}, export=export)

    (seconds,) = run_ranks(seconds_of, 1, task(tmp_path / "whole"))
    expected = digests(tmp_path / "whole")
    moments, killed = random.Random(0), 0
    while killed < KILLS:
        output = tmp_path / f"out{killed}"
        moment = moments.uniform(0, seconds)
        try:
            run_ranks(run_until_killed, 1, task(output), moment)
        except RankFailed as error:
            assert "died" in str(error)
            killed += 1
        else:
            print(f"not killed within {moment:.1f} s")  # the job was faster than the one that was timed
        if not output.exists():
            run_ranks(run_task, 1, task(output, resume=True))
        found = digests(output)
        assert found.keys() == expected.keys(), f"killed after {moment:.2f} s"
        different = {name.partition("/")[2] for name in expected if found[name] != expected[name]}
        assert different <= {*TIMED, *REPEATS_ARGUMENTS}, f"killed after {moment:.2f} s"
        assert {path.name for path in tmp_path.iterdir()} == {"whole", output.name}
        shutil.rmtree(output)
