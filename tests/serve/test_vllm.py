# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM loads what is exported, and answers as our reader predicts (`make test-serve`).

It runs on the CPU, in an environment of its own. What its CPU build has kernels for is loaded as it is; for the others
vLLM loads the weights, and torch computes (tests/serve/emulation.py).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve_table import mean_difference
from nemo_ptq.config import NO_QUANT
from tests.serve.environment import ENVIRONMENT, PYTHON
from tests.serve.exports import CELLS, DEMO, Cell

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

ASK = Path(__file__).parent / "ask_vllm.py"
PROCESSES = 2


def bound(cell: Cell) -> float:
    """What the mean difference of log probabilities is below."""
    # Random weights' answers move farther than the demo model's.
    if cell.kv_cache:  # the CPU kernel truncates where it writes FP8
        return 0.1 if cell.model == DEMO else 0.3
    if cell.runs_on_a_cpu and cell.algorithm != NO_QUANT:  # in bfloat16
        return 0.04 if cell.model == DEMO else 0.1
    return 0.01 if cell.model == DEMO else 0.03


@pytest.fixture(scope="module")
def answers(exports: Path) -> dict[str, dict[str, Any]]:
    """What vLLM answered, by path: processes load the exports, each one after the other."""
    folder = exports / "answers"
    command = [str(PYTHON), str(ASK), str(exports), str(folder), "--cpu"]
    with (exports / "vllm.log").open("w") as log:
        processes = [
            subprocess.Popen(
                [*command, "--share", f"{index}/{PROCESSES}"], stdout=log, stderr=log, env=os.environ | ENVIRONMENT
            )
            for index in range(PROCESSES)
        ]
        assert [process.wait(1500) for process in processes] == [0] * PROCESSES, exports / "vllm.log"
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
    return {answer["directory"]: answer for answer in found}


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.is_refused], ids=lambda cell: cell.path)
def test_it_answers_as_the_reader_predicts(
    cell: Cell, predicted: dict[str, dict[str, Any]], answers: dict[str, dict[str, Any]]
) -> None:
    answer = answers[cell.path]
    assert "error" not in answer, answer["error"]
    expected = predicted[cell.path]["log_probs"]
    far = mean_difference(answer["log_probs"], expected)
    print(f"{cell.path}: {far:.5f}")
    assert far < bound(cell)
    if cell.is_emulated and not cell.kv_cache:
        # A value in the middle between two codes is rounded up or down by the last bit of float32, and moves all that
        # follows it in its text. What is read wrongly moves every text.
        texts = zip(answer["log_probs"], expected, strict=True)
        assert min(mean_difference([theirs], [ours]) for theirs, ours in texts) < 0.005


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.is_refused], ids=lambda cell: cell.path)
def test_it_refuses_what_the_table_says(cell: Cell, answers: dict[str, dict[str, Any]]) -> None:
    assert "ModelOpt currently only supports" in answers[cell.path]["error"]
