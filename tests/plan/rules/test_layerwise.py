# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about one block of weights at a time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.staging import begin, reserved
from nemo_ptq.export.leftover import PROGRESS, finished_blocks
from nemo_ptq.plan.rules.layerwise import layerwise_is_possible, leftover_is_wanted
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import expect

PLAIN: dict[str, Any] = {
    "generate_sample": False,
    "algorithm": "fp8",
    "forward_loop": None,
    "model": LLAMA_8B,
    "formats": ("trtllm", "hf"),
}


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ({}, None),
        ({"generate_sample": True}, "set export_config.generate_sample=false"),
        ({"algorithm": "my.yaml"}, "use one of the built-in algorithms"),
        ({"forward_loop": print}, "leave out forward_loop and give calibration_dataset"),
        ({"model": replace(LLAMA_8B, is_quantized=True)}, "give the checkpoint as it was before"),
        ({"formats": ("trtllm", "nemo")}, "leave it out of export_config.export_format"),
    ],
)
def test_what_needs_the_whole_model_is_refused_layer_wise(asked: dict[str, Any], fix: str | None) -> None:
    arguments = {**PLAIN, **asked}
    problem = layerwise_is_possible(layerwise=True, **arguments)
    expect(problem, fix)
    assert problem is None or problem.startswith("quantization_config.layerwise=true keeps one block of weights")
    for wanted in (None, False):
        assert layerwise_is_possible(layerwise=wanted, **arguments) is None


def test_an_earlier_run_is_continued_or_removed_by_hand(tmp_path: Path) -> None:
    output = tmp_path / "out"
    for resume in (False, True):
        assert leftover_is_wanted(output, resume) is None
    staging = begin(output)
    staging.journal.mkdir()
    assert leftover_is_wanted(output, False) is None  # nothing is finished
    (staging.journal / PROGRESS).write_text(json.dumps({"next_block": 7}))
    assert finished_blocks(staging.root) == 7
    problem = leftover_is_wanted(str(output), False)
    expect(problem, "an earlier run has finished 7 blocks: repeat the command with export_config.resume=true")
    expect(problem, f"or remove them with `rm -r {staging.root}`")
    assert leftover_is_wanted(str(output), True) is None
    with reserved(output):  # it still runs, and another rule says so
        assert leftover_is_wanted(str(output), False) is None
