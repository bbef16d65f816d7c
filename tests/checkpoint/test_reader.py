# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory as input: what is exported from it is what is exported from its import."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.report.write import FILES
from nemo_ptq.verify.trtllm.trtllm_reader import same_bytes
from tests.engine.test_run import run_task
from tests.families import make_hf
from tests.files import digests
from tests.ranks import run_ranks

STATE = "ptq/calibration.safetensors"
# Different for naming the checkpoint.
NAMES_THE_SOURCE = {"ptq/manifest.json", STATE, *map(str, FILES)}


def quantize(source: Path, output: Path, layout: tuple[int, int, int], data: Path) -> None:
    tp, pp, ep = layout
    task = {
        "nemo_checkpoint": str(source),
        "export_config": ExportConfig(path=str(output)),
        "quantization_config": QuantizationConfig(
            "fp8", quality="fast", calibration_dataset=str(data), calibration_seq_len=16
        ),
        "calibration_tp": tp,
        "calibration_pp": pp,
        "calibration_ep": ep,
    }
    run_ranks(run_task, math.prod(layout), task)


# Rotary scaling and an odd vocabulary; tied embeddings; experts; biases.
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama31", (1, 1, 1)),
        ("gemma", (2, 2, 1)),
        pytest.param("llama31", (2, 2, 1), marks=pytest.mark.slow),
        pytest.param("mixtral", (1, 1, 2), marks=pytest.mark.slow),
        pytest.param("gemma", (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("mixtral", (2, 2, 1), marks=pytest.mark.slow),
        pytest.param("starcoder2", (1, 1, 1), marks=pytest.mark.slow),
        pytest.param("starcoder2", (2, 2, 1), marks=pytest.mark.slow),
        pytest.param("starcoder", (2, 1, 1), marks=pytest.mark.slow),
        pytest.param("nemotron", (2, 2, 1), marks=pytest.mark.slow),
        pytest.param("mistral", (1, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_the_import_may_be_left_out(
    name: str, layout: tuple[int, int, int], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.txt"
    data.write_text("def add(a, b): return a + b\nThe quick brown fox jumps over the lazy dog.\n" * 4)
    imported = checkpoint_of(name)
    source = imported.with_name(f"{name}.hf")
    before = digests(source)
    quantize(imported, tmp_path / "imported", layout, data)
    quantize(source, tmp_path / "direct", layout, data)
    expected, found = digests(tmp_path / "imported"), digests(tmp_path / "direct")
    different = {file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file)}
    assert different <= NAMES_THE_SOURCE
    states = [load_file(tmp_path / which / STATE) for which in ("imported", "direct")]
    assert states[0].keys() == states[1].keys()
    assert all(same_bytes(states[0][key], states[1][key]) for key in states[0])
    assert digests(source) == before


def test_no_weights_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written on the way are a tokenizer's files."""
    import nemo.collections.llm  # noqa: F401  (its import makes files of its own)

    from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel

    source = make_hf("llama2", tmp_path / "hf")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    with HuggingFaceModel(source).model_config():
        written = sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("*") if path.is_file())
    assert 0 < written < 100_000 < (source / "model.safetensors").stat().st_size
    assert not any((tmp_path / "scratch").iterdir())
