# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The commands of the README and of the first pages of the docs are run as they stand there, on the demo's files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_ptq.cli.app import app
from nemo_ptq.launch.flags import read_arguments
from nemo_ptq.plan.rules import check_job
from tests.conftest import Demo

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
# Pages whose blocks are commands on CKPT, OUT and FILE, in the order of their reading.
PAGES = (README, *((ROOT / "docs" / f"{name}.md").read_text() for name in ("index", "launch", "layerwise", "output")))
# What a block of commands begins with.
PROGRAMS = ("nemo", "nemo-ptq", "torchrun", "python", "import", "from", "make", "pip", "srun", "trtllm-build")
# What is not run, by a part of the command, and why.
NOT_RUN = {
    "make ": "the environment of the tests was made by it",
    "pip install": "the environment of the tests was made with it",
    "srun ": "needs a cluster: tests/cluster",
    "run.executor=slurm": "needs a cluster: tests/cluster",
    "run.executor=docker": "needs a Docker daemon: tests/launch/test_containers.py",
    "run.executor=kubeflow": "needs a cluster: tests/launch/test_containers.py",
    "trtllm-build": "needs TensorRT-LLM",
    "from nemo_export": "needs TensorRT-LLM",
}
# The beginning of a command that makes OUT.
JOBS = ("nemo llm ptq", "nemo-ptq run", "torchrun")


def blocks() -> Iterator[str]:
    """The indented blocks of the pages, without their indentation."""
    for page in PAGES:
        for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", page, re.MULTILINE):
            yield re.sub(r"^    ", "", block, flags=re.MULTILINE).strip()


def commands() -> list[str]:
    """The shell commands of the pages in their order, each once and in one line; Python programs as they stand."""
    found = []
    for block in blocks():
        if block.startswith(("import ", "from ")):
            found.append(block)
        elif block.split()[0] in PROGRAMS:
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [re.sub(r"\s+# .*", "", line) for line in lines if line]
    return list(dict.fromkeys(found))


def is_run(command: str) -> bool:
    return not any(part in command for part in NOT_RUN)


def is_python(command: str) -> bool:
    return command.startswith(("import ", "from "))


def test_the_commands_are_found() -> None:
    beginnings = [command.split()[0] for command in commands() if is_run(command)]
    assert {"nemo", "nemo-ptq", "torchrun", "import"} <= set(beginnings)
    for part in NOT_RUN:
        assert any(part in command for command in commands()), f"{part} is no longer in the pages"


def test_a_block_is_a_command_or_a_list_of_files() -> None:
    others = [block for block in blocks() if block.split()[0] not in PROGRAMS]
    assert all(block.splitlines()[0].endswith("/") for block in others), others


def test_links_of_the_readme_lead_to_files() -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_subcommands_in_the_text_exist() -> None:
    named = [name for page in PAGES for name in re.findall(r"`nemo-ptq\s+([a-z][a-z-]*)", page)]
    names = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert len(named) > 3
    assert set(named) <= names


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith(JOBS) and is_run(command)])
def test_every_job_is_sound(command: str, demo: Demo, tmp_path: Path) -> None:
    words = shlex.split(substituted(command, demo, tmp_path))
    arguments = [word for word in words if "=" in word or word.startswith("--")]
    arguments = [word for word in arguments if not word.startswith("--nproc")]
    job = check_job(**read_arguments(arguments), world_size=2)
    assert job.output == tmp_path / "OUT"


def substituted(command: str, demo: Demo, directory: Path) -> str:
    places = {"CKPT": demo.checkpoint, "FILE": demo.heldout, "OUT2": directory / "OUT2", "OUT": directory / "OUT"}
    places["SWEEP"] = directory / "SWEEP"
    return re.sub(r"\b(CKPT|FILE|OUT2|OUT|SWEEP)\b", lambda match: str(places[match[1]]), command)


def make_hub_data_set(demo: Demo, directory: Path) -> None:
    """Puts a data set with the name and form of the default one where the `datasets` library looks first."""
    texts = [json.loads(line)["text"] for line in demo.calibration.read_text().splitlines()]
    (directory / "cnn_dailymail").mkdir()
    (directory / "cnn_dailymail" / "README.md").write_text(
        '---\nconfigs:\n- config_name: "3.0.0"\n  data_files: train.jsonl\n---\n'
    )
    lines = [json.dumps({"article": text}) + "\n" for text in texts]
    (directory / "cnn_dailymail" / "train.jsonl").write_text("".join(lines))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_run(demo: Demo, tmp_path: Path) -> None:
    make_hub_data_set(demo, tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "NEMORUN_HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hf"),
    }
    has_output = False
    for command in filter(is_run, commands()):
        if command.startswith(JOBS) or is_python(command):
            shutil.rmtree(tmp_path / "OUT", ignore_errors=True)
            has_output = True
        program = substituted(command, demo, tmp_path)
        if is_python(command):
            (tmp_path / "program.py").write_text(program)
            program = "python program.py"
        result = subprocess.run(
            ["bash", "-c", program],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        assert has_output == (tmp_path / "OUT" / "config.json").is_file(), f"{command}\n{result.stdout}"
