# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of what a server answered, and the list of exports that it is tried with."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.serve_table import main, mean_difference, perplexity
from nemo_ptq.models.registry import families
from tests.serve.exports import CELLS, FAMILIES


def test_figures_are_of_all_tokens_together() -> None:
    assert perplexity([[math.log(0.5)], [math.log(0.125), math.log(0.25)]]) == pytest.approx(4.0)
    assert mean_difference([[1.0], [2.0, 4.0]], [[1.5], [2.0, 3.0]]) == pytest.approx(0.5)
    assert mean_difference([[math.nan]], [[1.0]]) == math.inf


def test_what_was_answered_stands_beside_the_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in ("answers", "speed"):
        (tmp_path / directory).mkdir()
    requests = [{"directory": name, "tokens": [[1, 2]], "log_probs": [[-1.0]]} for name in ("a/hf", "b/hf", "c/hf")]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    answers = [
        {"directory": "b/hf", "vllm": "1.0", "error": "ValueError: no\nsuch | thing"},
        {"directory": "a/hf", "vllm": "1.0", "log_probs": [[-1.25]]},
    ]
    for index, answer in enumerate(answers):
        (tmp_path / "answers" / f"{index}.json").write_text(json.dumps(answer))
    measured = {"path": "a/hf", "vllm": "1.0", "tokens_per_second": {"1": 200.4, "64": 12000.0}}
    (tmp_path / "speed" / "a.json").write_text(json.dumps(measured))
    main(tmp_path, tmp_path / "answers", tmp_path / "speed")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vLLM 1.0"
    assert "| a/hf | 3.49 | 2.72 | 0.2500 |" in lines and "| a/hf | 200 | 12,000 |" in lines
    assert "| b/hf | refused: ValueError: no such / thing | | |" in lines
    assert not any("c/hf" in line for line in lines), "it was not asked"


def test_every_family_with_a_hugging_face_class_is_tried() -> None:
    served = {family.name for family in families() if family.refused is None and family.hugging_face is not None}
    # vLLM takes CodeLlama for a Llama, and Nemotron Nano v2 for a Nemotron-H.
    assert served - {"CodeLlama", "Nemotron Nano v2"} == set(FAMILIES.values())
    assert len({cell.path for cell in CELLS}) == len(CELLS)
