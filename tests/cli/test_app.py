# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The `nemo-ptq` command: light to start, one line for an error."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_ptq.cli import app
from nemo_ptq.errors import PtqError
from tests.families import make_hf


def test_starts_without_the_heavy_libraries() -> None:
    code = "import sys, nemo_ptq.cli.app; print(*{'torch', 'nemo', 'megatron', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_import_hf_makes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, output = make_hf("llama2", tmp_path / "hf", num_layers=1), tmp_path / "nemo"
    command = ["nemo-ptq", "import-hf", str(source), str(output)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    assert capfd.readouterr().out == f"Wrote {output}\n"
    assert (output / "weights" / "metadata.json").is_file()

    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    assert capfd.readouterr().err == f"Error: {output} exists: choose another output, or ask to overwrite it\n"

    monkeypatch.setattr(sys, "argv", [*command, "--overwrite"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0


def test_an_error_is_one_line(tmp_path: Path) -> None:
    code = "from nemo_ptq.cli.app import main; main()"
    arguments = ["import-hf", str(tmp_path), str(tmp_path / "nemo")]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"Error: {tmp_path} lacks config.json; found there: nothing\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "nowhere"), "nowhere is not a directory: give one that was exported, or a checkpoint's"),
        (("evaluate", ".", "--baseline", "nowhere"), "nowhere is not a directory"),
        (("export", "~nobody_at_all/x", "OUT"), "cannot be read (No such file or directory): give an export that was"),
        (("convert", "~nobody_at_all/x", "OUT", "--format", "hf"), "~nobody_at_all/x does not exist: give the"),
        (("convert", "nowhere", "OUT", "--format", "gguf"), "--format gguf is not known: choose one of hf, nemo, meg"),
    ],
)
def test_a_place_that_is_not_there_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app.app, list(arguments))
    assert isinstance(ended.exception, PtqError)
    assert said in str(ended.exception)
    assert "\n" not in str(ended.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate", "memory holds one layer in float32. Prints perplexity"),
        ("plan", "(default: plan_device, which is H100)"),
        ("sweep", "(default: fp8,int8_sq,int4_awq)"),
    ],
)
def test_the_help_is_whole(command: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in square brackets would be markup, and lines of docstrings would stay as short as they are."""
    monkeypatch.setenv("COLUMNS", "400")
    ended = CliRunner().invoke(app.app, [command, "--help"], terminal_width=400)
    assert ended.exit_code == 0
    assert said in " ".join(ended.output.split())
