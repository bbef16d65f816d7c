# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever a checkpoint brings, and whatever reads it: nothing of it runs, and what is wrong is said in a line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.checkpoint.huggingface.importer import import_hf
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.launch import front
from nemo_ptq.quantization.state_header import StateHeader
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import open_model
from tests.conftest import Demo
from tests.hostile import Pickled, change_graph, copy_of, make_file, with_argument

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(demo: Demo, tmp_path: Path) -> Path:
    """A copy of the demo's checkpoint, to be changed."""
    return copy_of(demo.checkpoint, tmp_path / "checkpoint")


def in_the_context(checkpoint: Path, marker: Path) -> None:
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", "rotary_base", make_file(marker)))


def in_model_yaml(checkpoint: Path, marker: Path) -> None:
    file = checkpoint / "context" / "model.yaml"
    file.write_text(f"{file.read_text()}\nextra: !!python/object/apply:os.mkdir [{str(marker)!r}]\n")


def in_the_index(checkpoint: Path, marker: Path) -> None:
    file = checkpoint / "weights" / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.planner_data = Pickled(marker)
    file.unlink()  # a link to the original
    file.write_bytes(pickle.dumps(index))


PLACES = [in_the_context, in_model_yaml, in_the_index]


def saved_state(output: Path) -> Path:
    """A saved calibration, beside an output."""
    file = output.with_name("state.safetensors")
    header = StateHeader("/then", "", {}, "llama", QuantizationConfig(), {"algorithm": "max"}, {})
    save_file({"x": np.zeros(1, np.float32)}, file, header.to_metadata())
    return file


def commands(checkpoint: Path, output: Path) -> dict[str, list[str]]:
    """The commands that read a checkpoint before anything starts."""
    named = [f"nemo_checkpoint={checkpoint}", f"export_config.path={output}"]
    return {
        "run": [str(BIN / "nemo-ptq"), "run", *named, "quantization_config.calibration_dataset=/nowhere.txt"],
        "plan": [str(BIN / "nemo-ptq"), "plan", *named],
        "export": [
            str(BIN / "nemo-ptq"),
            "export",
            str(saved_state(output)),
            str(output),
            "--checkpoint",
            str(checkpoint),
        ],
        "script": [sys.executable, "-m", "nemo_ptq.script", f"--nemo_checkpoint={checkpoint}", "--plan_only"],
    }


def run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["run", "plan", "export", "script"])
def test_no_command_runs_code_of_a_checkpoint(
    command: str, place: Callable[[Path, Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    place(checkpoint, marker)
    ended = run(commands(checkpoint, tmp_path / "out")[command], tmp_path)
    assert not marker.exists()
    assert "Traceback" not in ended.stderr
    if place is in_the_context:
        assert ended.returncode != 0
        told = ended.stdout + ended.stderr
        assert "names subprocess.getoutput at model.config.rotary_base" in told
        spelled = {"script": "--trust_checkpoint", "export": "--trust-checkpoint"}.get(command, "trust_checkpoint")
        assert f"add {spelled}=subprocess.getoutput" in told


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("read", [verify, open_model])
def test_verifying_runs_no_code_of_a_checkpoint(
    read: Callable[[Path], Any], place: Callable[[Path, Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    place(checkpoint, tmp_path / "marker")
    try:
        read(checkpoint)
    except PtqError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "marker").exists()


def no_file(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def no_text(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"\xff\xfe\0\0damaged")


def no_end(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("damage", [no_file, no_text, no_end])
@pytest.mark.parametrize(
    "file", ["context/io.json", "context/model.yaml", "weights/.metadata", "weights/metadata.json"]
)
def test_a_damaged_file_is_named_in_a_line(
    file: str, damage: Callable[[Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint / file)
    with pytest.raises(PtqError) as caught:
        front.plan({"nemo_checkpoint": str(checkpoint), "export_config": _export(tmp_path)}, world_size=1)
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("damage", [no_file, no_text, no_end])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_hugging_face_file_is_named_in_a_line(
    file: str, damage: Callable[[Path], None], demo: Demo, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(demo.hf, tmp_path / "hf"))
    damage(source / file)
    with pytest.raises(PtqError) as caught:
        import_hf(str(source), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("setting", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", ["1000000000000", '"4"', "4.5", "[4]", "null", "true", "0", "-1"])
def test_a_size_that_is_none_is_told_in_a_line(setting: str, value: str, demo: Demo, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo.hf, tmp_path / "hf"))
    content = json.loads((source / "config.json").read_text()) | {setting: json.loads(value)}
    (source / "config.json").write_text(json.dumps(content))
    for read in (read_metadata, lambda source: import_hf(str(source), str(tmp_path / "out"))):
        with pytest.raises(PtqError, match=r"config\.json") as caught:
            read(source)
        assert "\n" not in str(caught.value)


def _export(directory: Path) -> ExportConfig:
    return ExportConfig(str(directory / "out"))


NAMES = ("typer", "yaml", "json", "typing", "rich", "torch", "numpy")


@pytest.fixture
def hostile_directory(demo: Demo, tmp_path: Path) -> Path:
    """A model's directory in which files are called as modules are."""
    directory = Path(shutil.copytree(demo.hf, tmp_path / "hf"))
    for name in NAMES:
        (directory / f"{name}.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'a').write({name!r})\n")
    return directory


@pytest.mark.parametrize("command", ["run", "plan", "script", "-m nemo_ptq"])
def test_modules_do_not_come_from_the_working_directory(command: str, hostile_directory: Path, tmp_path: Path) -> None:
    words = commands(Path("."), tmp_path / "out").get(command)
    ended = run(words or [sys.executable, "-m", "nemo_ptq", "plan", "nemo_checkpoint=."], hostile_directory)
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "marker").exists()


def test_plugins_are_found_without_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('found')\n")
    environment = {**os.environ, "NEMO_PTQ_PLUGINS": "mine", "PYTHONSAFEPATH": "1"}
    for path, found in ((str(ROOT), "No module named 'mine'"), (f"{ROOT}:{tmp_path}", "RuntimeError: found")):
        ended = subprocess.run(
            [sys.executable, "-m", "nemo_ptq", "recipes"],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert found in ended.stderr


@pytest.mark.slow
def test_no_rank_takes_modules_from_the_working_directory(demo: Demo, hostile_directory: Path, tmp_path: Path) -> None:
    ended = run(
        [
            str(BIN / "nemo-ptq"),
            "run",
            "nemo_checkpoint=.",
            "calibration_tp=2",
            f"export_config.path={tmp_path / 'out'}",
            f"quantization_config.calibration_dataset={demo.calibration}",
            "quantization_config.quality=fast",
            "quantization_config.calibration_dataset_size=2",
            "quantization_config.calibration_batch_size=2",
        ],
        hostile_directory,
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "marker").exists()


@pytest.mark.timeout(20)
def test_a_data_set_that_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    for name in ("a.txt", "a.json", "a.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(
            PtqError, match=f"calibration_dataset={tmp_path / name} cannot be read: it is not a regular"
        ):
            list(read_text_file(str(tmp_path / name)))
