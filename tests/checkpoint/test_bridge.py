# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that Megatron-Bridge itself has saved, where it is there: `make bridge` puts it into build/bridge."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.checkpoint.huggingface.description import describe
from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.console.reporter import Reporter
from nemo_ptq.engine.convert import convert
from tests.families import make_hf

ROOT = Path(__file__).parents[2]
BRIDGE = ROOT / "build" / "bridge"
# Bridge 0.3 takes the width of Qwen 3's heads, and three numbers of Llama 3.1's scaling, to be the usual ones.
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama31": {
        "rope_scaling": {**LLAMA_31, "original_max_position_embeddings": 8192},
        "max_position_embeddings": 16384,
    },
    "qwen3": {"head_dim": 128},
}


@pytest.mark.slow
@pytest.mark.skipif(not BRIDGE.is_dir(), reason="needs build/bridge (make bridge)")
@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_one_that_bridge_imported(name: str, tmp_path: Path) -> None:
    source, root = make_hf(name, tmp_path / "hf", **MODELS[name]), tmp_path / "bridge"
    command = [sys.executable, "-m", "tests.bridge", str(BRIDGE), str(source), str(root)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (root / "iter_0000000" / "run_config.yaml").is_file()
    assert read_metadata(root) == describe(source).spec
    convert(root, tmp_path / "out", "hf", None, Reporter(False))
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
