# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""An export straight from the checkpoint's files has the bytes of the engine's, in every format, for every family."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.checkpoint.index import read_stored
from nemo_ptq.checkpoint.torch_dist import read_chunk
from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.algorithms import algorithm_named
from nemo_ptq.report.write import FILES
from nemo_ptq.verify.checks import verify
from tests.conftest import Demo
from tests.engine.test_run import arguments as job_arguments
from tests.engine.test_run import run_task
from tests.matrix import ALGORITHMS, ROWS
from tests.ranks import run_ranks

FORMATS = ("trtllm", "hf", "compressed_tensors")
MODELS = [model for row in ROWS for model in row.models]
QUANTIZED = tuple(algorithm for algorithm in ALGORITHMS if algorithm != NO_QUANT)
# Norms that are kept minus one and a tied embedding; one layer for queries, keys and values; experts.
QUICK = [("llama31", ("int4_awq", "nvfp4")), ("gemma", ("int8_sq",)), ("starcoder", ("fp8",)), ("mixtral", ("fp8",))]


def possible_formats(checkpoint: Path, algorithm: str, output: Path) -> list[str]:
    """The formats that can hold a model quantized with an algorithm."""
    found = []
    for name in FORMATS:
        try:
            check_job(world_size=1, **arguments(checkpoint, algorithm, [name], output))
        except ConfigError:
            continue
        found.append(name)
    return found


def arguments(checkpoint: Path, algorithm: str, formats: list[str], output: Path) -> dict[str, Any]:
    return {
        "nemo_checkpoint": str(checkpoint),
        "quantization_config": QuantizationConfig(
            algorithm, quality="fast", enable_kv_cache=algorithm in ("fp8", "int4_awq")
        ),
        "export_config": ExportConfig(path=str(output), export_format=formats, inference_tp=1),
        "forward_loop": print if algorithm_named(algorithm).needs_data else None,
    }


def export_twice(checkpoint: Path, algorithms: tuple[str, ...], directory: Path) -> list[str]:
    """Calibrates and exports with the engine, then again from the state. Returns the files that differ."""
    from nemo_ptq.engine.reexport import is_possible, run_reexport
    from tests import steps
    from tests.files import digests

    different = []
    for algorithm in algorithms:
        output, again = directory / algorithm, directory / f"{algorithm}-again"
        formats = possible_formats(checkpoint, algorithm, output)
        if not formats:
            continue
        job = check_job(world_size=1, **arguments(checkpoint, algorithm, formats, output))
        steps.run_job(job)
        export = ExportConfig(path=str(again), export_format=formats)
        repeated = check_job(world_size=1, calibration_state=output, export_config=export)
        assert is_possible(repeated, 1)
        run_reexport(repeated)
        found, expected = digests(again), digests(output)
        names = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
        different += [f"{algorithm}: {name}" for name in sorted(names) if not _tells_of_the_job(name)]
    return different


def _tells_of_the_job(name: str) -> bool:
    return name.endswith(("ptq/manifest.json", *map(str, FILES)))


@pytest.mark.parametrize(("model", "algorithms"), QUICK)
def test_the_bytes_are_the_engines(
    model: str, algorithms: tuple[str, ...], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert run_ranks(export_twice, 1, checkpoint_of(model), algorithms, tmp_path) == [[]]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_bytes_are_the_engines_for_every_cell(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    assert run_ranks(export_twice, 1, checkpoint_of(model), QUANTIZED, tmp_path) == [[]]


COMMAND = """
import sys
from nemo_ptq.cli.app import main
try:
    main()
finally:
    heavy = {"megatron", "modelopt", "nemo", "lightning", "nemo_run"} & set(sys.modules)
    print("imported:", sorted(heavy))
"""


@pytest.mark.parametrize("format", FORMATS)
def test_it_imports_nothing_that_runs_models(format: str, exported: Path, tmp_path: Path) -> None:
    words = ["export", str(exported), str(tmp_path / "again"), "--format", format]
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imported: []" in done.stdout
    assert all(check.ok for check in verify(tmp_path / "again", load_tokenizer=True))


@pytest.fixture(scope="module")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the demo model."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_ranks(run_task, 1, job_arguments(demo, output))
    return output


def test_what_needs_a_model_is_left_to_the_engine(demo: Demo, exported: Path, tmp_path: Path) -> None:
    from nemo_ptq.engine.reexport import is_possible

    state, output = exported, str(tmp_path / "out")

    def possible(world_size: int = 1, **changes: Any) -> bool:
        task: dict[str, Any] = {"calibration_state": str(state), "export_config": ExportConfig(output), **changes}
        return is_possible(check_job(world_size=world_size, **task), world_size)

    assert possible()
    assert possible(export_config=ExportConfig(output, export_format=["hf", "trtllm"], inference_tp=2, dtype="fp16"))
    assert not possible(export_config=ExportConfig(output, export_format="nemo"))
    assert not possible(export_config=ExportConfig(output, generate_sample=True))
    assert not possible(tokenizer_path=str(demo.hf))
    assert not possible(world_size=2, calibration_tp=2)
    fresh = {"nemo_checkpoint": str(demo.checkpoint), "calibration_state": None, "forward_loop": print}
    assert not possible(**fresh)


def test_other_weights_are_refused(
    demo: Demo, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from nemo_ptq.engine.reexport import run_reexport

    other = Path(shutil.copytree(demo.checkpoint, tmp_path / "other"))
    (shard,) = (other / "weights").glob("*.distcp")
    place = read_stored(other).tensors["module.decoder.layers.mlp.linear_fc2.weight"].chunks[0]
    weight = read_chunk(other / "weights", place)
    weight.view(torch.int16)[..., 7, 11] ^= 1  # one bit
    saved = io.BytesIO()
    torch.save(weight, saved)
    content = bytearray(shard.read_bytes())
    assert len(saved.getvalue()) == place.length
    content[place.start : place.start + place.length] = saved.getvalue()
    shard.write_bytes(content)
    export = ExportConfig(str(tmp_path / "out"))
    job = check_job(world_size=1, nemo_checkpoint=other, calibration_state=exported, export_config=export)
    with pytest.raises(PtqError, match="was made from other weights"):
        run_reexport(job)
    assert not (tmp_path / "out").exists()
