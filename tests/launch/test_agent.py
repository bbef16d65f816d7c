# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq run` on several ranks says what its ranks say, and leaves nothing in the temporary directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_ptq.launch.agent import ending

RANK = """
import os, signal, sys, time
if os.environ["RANK"] == "0":
    time.sleep(600)
if sys.argv[1] == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
print("Error: calibration_tp=3 is not valid", file=sys.stderr, flush=True)
sys.exit(2)
"""
KILLED = "Error: rank 1 was ended by SIGKILL; if nobody has killed it, the machine has run out of memory"


@pytest.mark.parametrize(
    ("what", "status", "said"), [("fails", 2, "Error: calibration_tp=3 is not valid"), ("dies", 1, KILLED)]
)
def test_a_rank_that_has_failed_has_the_last_word(what: str, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "tmp").mkdir()
    command = ["-m", "nemo_ptq.launch.agent", "--standalone", "--nproc_per_node=2", str(tmp_path / "rank.py"), what]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == status
    assert done.stderr.splitlines() == [said]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_how_a_rank_has_ended() -> None:
    assert ending(1, 0) is None
    assert ending(-11, 3) == "Error: rank 3 was ended by SIGSEGV"
    assert ending(-40, 3) == "Error: rank 3 was ended by signal 40"
