# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM loads what is exported, and answers as our reader predicts (`make test-serve`).

It runs on the CPU, in an environment of its own. What its CPU build has kernels for is loaded as it is; for the others
vLLM loads the weights, and torch computes (tests/serve/emulation.py).
"""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve_table import mean_difference
from nemo_ptq.config import NO_QUANT
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from tests.conftest import Demo
from tests.serve.exports import ASKED_ON_A_CPU, DEMO, Cell, make_exports

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

PYTHON = Path(__file__).parents[2] / "build" / "venv-vllm" / "bin" / "python"
ASK = Path(__file__).parent / "ask_vllm.py"
NATIVE = [cell for cell in ASKED_ON_A_CPU if cell.runs_on_a_cpu]
EMULATED = [cell for cell in ASKED_ON_A_CPU if not cell.runs_on_a_cpu and not cell.is_refused]
REFUSED = [cell for cell in ASKED_ON_A_CPU if cell.is_refused]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PROCESSES = 2


def bound(cell: Cell) -> float:
    """What the mean difference of log probabilities is below."""
    # Random weights' answers move farther than the demo model's.
    if cell.kv_cache:  # the CPU kernel truncates where it writes FP8
        return 0.1 if cell.model == DEMO else 0.3
    if cell.runs_on_a_cpu and cell.algorithm != NO_QUANT:  # in bfloat16
        return 0.04 if cell.model == DEMO else 0.1
    return 0.01 if cell.model == DEMO else 0.03


def ask(exports: Path, cells: Sequence[Cell], *options: str) -> dict[str, dict[str, Any]]:
    """Has processes of vLLM load exports, each one after the other; returns their answers by path."""
    answers = exports / "answers"
    command = [str(PYTHON), str(ASK), str(exports), str(answers), *options, *(cell.path for cell in cells)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with (exports / "vllm.log").open("a") as log:
        processes = [
            subprocess.Popen([*command, "--share", f"{index}/{PROCESSES}"], stdout=log, stderr=log, env=environment)
            for index in range(PROCESSES)
        ]
        assert [process.wait(1500) for process in processes] == [0] * PROCESSES, exports / "vllm.log"
    found = [json.loads(file.read_text(encoding="utf-8")) for file in answers.glob("*.json")]
    return {answer["directory"]: answer for answer in found}


@pytest.fixture(scope="module")
def exports(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every export, below one directory."""
    assert PYTHON.exists(), "run `make serve-env`"
    directory = tmp_path_factory.mktemp("served")
    make_exports(directory, ASKED_ON_A_CPU)
    return directory


@pytest.fixture(scope="module")
def predicted(exports: Path) -> dict[str, list[list[float]]]:
    """Our reader's log probabilities, by path."""
    requests = json.loads((exports / "requests.json").read_text(encoding="utf-8"))
    return {request["directory"]: request["log_probs"] for request in requests}


@pytest.fixture(scope="module")
def answers(exports: Path) -> dict[str, dict[str, Any]]:
    """What vLLM answered, by path."""
    ask(exports, [cell for cell in NATIVE if cell.algorithm == NO_QUANT], "--dtype", "float32")
    ask(exports, [cell for cell in (*NATIVE, *REFUSED) if cell.algorithm != NO_QUANT], "--dtype", "bfloat16")
    return ask(exports, EMULATED, "--dtype", "float32", "--emulate")


@pytest.mark.parametrize("cell", [*NATIVE, *EMULATED], ids=lambda cell: cell.path)
def test_it_answers_as_the_reader_predicts(
    cell: Cell, predicted: dict[str, list[list[float]]], answers: dict[str, dict[str, Any]]
) -> None:
    answer = answers[cell.path]
    assert "error" not in answer, answer["error"]
    far = mean_difference(answer["log_probs"], predicted[cell.path])
    print(f"{cell.path}: {far:.5f}")
    assert far < bound(cell)


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.path)
def test_it_refuses_what_the_table_says(cell: Cell, answers: dict[str, dict[str, Any]]) -> None:
    assert "ModelOpt currently only supports" in answers[cell.path]["error"]


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        address: Where it answers.
        path: The export that it serves, below the directory of all.
    """

    address: str
    path: str


@pytest.fixture(params=[f"{DEMO}/{NO_QUANT}/hf", f"{DEMO}/int4_awq/compressed_tensors"])
def served(exports: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server of an export in each format that it has CPU kernels for, started by the model card's own command."""
    directory = exports / request.param
    commands = {found.server: found.commands for found in read_report(directory / REPORT).servers}
    ((command,),) = (its for server, its in commands.items() if server.startswith("vLLM") and its)
    assert command.startswith("vllm serve ")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The CPU build is published as vllm-cpu: its command looks for a version under vllm, and for "cpu" in it.
    metadata = tmp_path / "site" / "vllm-0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0+cpu\n")
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(metadata.parents[1]),
    }
    options = f" --host 127.0.0.1 --port {port} --enforce-eager --max-model-len 256"
    log = tmp_path / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}{options}"], stdout=output, stderr=output, env=environment
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while not _is_up(address):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield Served(address, request.param)
        finally:
            process.terminate()
            process.wait(60)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


_CLIENT = """
import json, sys
from openai import OpenAI

address, prompt = sys.argv[1], json.loads(sys.argv[2])
client = OpenAI(base_url=f"{address}/v1", api_key="none")
(model,) = client.models.list().data
settings = {"model": model.id, "temperature": 0, "logprobs": 0}
scored = client.completions.create(prompt=prompt, max_tokens=1, echo=True, **settings).choices[0]
continued = client.completions.create(prompt="def add(a, b):", max_tokens=8, **settings).choices[0]
print(json.dumps([scored.logprobs.token_logprobs[1 : len(prompt)], continued.text]))
"""


def test_the_model_cards_command_serves_an_openai_client(served: Served, exports: Path) -> None:
    requests = json.loads((exports / "requests.json").read_text(encoding="utf-8"))
    (asked,) = (request for request in requests if request["directory"] == served.path)
    command = [str(PYTHON), "-c", _CLIENT, served.address, json.dumps(asked["tokens"][0])]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr[-2000:]
    log_probs, text = json.loads(answer.stdout)
    assert mean_difference([log_probs], asked["log_probs"][:1]) < 0.04  # in bfloat16
    assert re.search(r"\S", text)
