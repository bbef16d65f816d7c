# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is shipped tells neither whose home directory it was made in nor what stood in the environment."""

import os
import shutil
from pathlib import Path
from typing import Any

from nemo_ptq.config import ExportConfig
from nemo_ptq.home import without_home
from nemo_ptq.quantization.state_header import IN_EXPORT, read_header
from tests.conftest import Demo
from tests.engine.test_run import arguments, run_task
from tests.ranks import run_ranks

SECRETS = {name: f"secret-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_TOKEN")}


def run_in(home: Path, tasks: list[dict[str, Any]]) -> str:
    """Runs jobs of a user with a home directory and with secrets; returns the checkpoint that the last one knows."""
    os.environ |= {"HOME": str(home), **SECRETS}
    for task in tasks:
        run_task(task)
    return read_header(Path(tasks[-1]["export_config"].path) / "hf" / IN_EXPORT).checkpoint


def test_exports_name_no_home_and_no_secret(demo: Demo, tmp_path: Path) -> None:
    home = tmp_path / "home" / "alice"
    shutil.copytree(demo.checkpoint, home / "checkpoint")
    shutil.copy(demo.calibration, home / "texts.jsonl")
    first, again = home / "out", home / "again"
    whole = arguments(
        demo,
        first,
        nemo_checkpoint=str(home / "checkpoint"),
        quantization={"calibration_dataset": str(home / "texts.jsonl")},
        export={"export_format": ["trtllm", "hf"]},
    )
    repeated = {
        "calibration_state": str(first),
        "export_config": ExportConfig(str(again), export_format=["trtllm", "hf"]),
    }
    # The checkpoint is found again although the state does not name the home directory.
    assert run_ranks(run_in, 1, home, [whole, repeated]) == [str(home / "checkpoint")]
    shipped = [file for output in (first, again) for file in output.rglob("*") if file.is_file()]
    assert len(shipped) > 40
    for file in shipped:
        content = file.read_bytes()
        found = [word for word in (str(home), "alice", "secret-of-") if word.encode() in content]
        assert not found, f"{file} holds {found}"
    assert b"~/checkpoint" in (first / "trtllm" / "ptq" / "manifest.json").read_bytes()


def test_only_a_beginning_is_a_home(monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    paths = {"a": "/home/alice/x", "b": {"c": "/home/alice"}, "d": "/home/alice2/x", "e": 1, "f": "/data/home/alice"}
    assert without_home(paths) == {"a": "~/x", "b": {"c": "~"}, "d": "/home/alice2/x", "e": 1, "f": "/data/home/alice"}
    assert without_home("/home/alice/a.txt,weight=2;/home/alice/b.txt") == "~/a.txt,weight=2;~/b.txt"
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data") == "/data"
