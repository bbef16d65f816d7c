# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Quantizers are restored from a checkpoint as data: no pickle in it runs, wherever it lies."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from tests.hostile import Pickled
from tests.ranks import run_ranks


def export_quantized(checkpoint: Path, output: Path) -> None:
    """Makes a NeMo checkpoint with quantizers."""
    from tests import steps

    steps.run_job(steps.job_of(checkpoint, QuantizationConfig("fp8"), output, formats="nemo"))


def restored(checkpoint: Path) -> tuple[str, int]:
    """Restores the quantizers; returns why that failed, and how many amaxes the model has."""
    from nemo_ptq.modelopt.restore import restore_quantizers
    from tests import steps

    with steps.loaded(checkpoint) as model:
        try:
            restore_quantizers(model.module, checkpoint)
        except PtqError as error:
            return str(error), 0
        return "", sum(name.endswith("._amax") for name, _ in model.module.named_buffers())


@pytest.fixture(scope="module")
def quantized(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "nemo"
    run_ranks(export_quantized, 1, checkpoint_of("llama31"), output)
    return output


def change_index(checkpoint: Path, change: Callable[[Any], object]) -> None:
    """Changes the pickled index of the weights."""
    file = checkpoint / "weights" / ".metadata"
    index = pickle.loads(file.read_bytes())
    change(index)
    file.write_bytes(pickle.dumps(index))


def in_the_index(checkpoint: Path, marker: Path) -> None:
    change_index(checkpoint, lambda index: setattr(index, "planner_data", Pickled(marker)))


def in_the_common_state(checkpoint: Path, marker: Path) -> None:
    torch.save({"x": Pickled(marker)}, checkpoint / "weights" / "common.pt")


def in_modelopts_state(checkpoint: Path, marker: Path) -> None:
    torch.save({"x": Pickled(marker)}, checkpoint / "weights" / "modelopt_state" / "common.pt")


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _in_an_object(checkpoint: Path, content: bytes) -> None:
    """Puts bytes in the place of what a quantized layer keeps beside its weights."""

    def change(index: Any) -> None:
        key = next(key for key in index.storage_data if "linear_fc2._extra_state" in key.fqn)
        place = index.storage_data[key]
        file = checkpoint / "weights" / place.relative_path
        index.storage_data[key] = replace(place, offset=file.stat().st_size, length=len(content))
        file.write_bytes(file.read_bytes() + content)

    change_index(checkpoint, change)


def in_an_object(checkpoint: Path, marker: Path) -> None:
    _in_an_object(checkpoint, _saved([Pickled(marker)]))


def in_the_bytes_of_an_object(checkpoint: Path, marker: Path) -> None:
    hostile = torch.frombuffer(bytearray(_saved({"x": Pickled(marker)})), dtype=torch.uint8)
    _in_an_object(checkpoint, _saved([hostile]))


@pytest.mark.parametrize("place", [in_the_index, in_the_common_state])
def test_pickles_that_are_not_needed_are_not_read(
    place: Callable[[Path, Path], None], quantized: Path, tmp_path: Path
) -> None:
    checkpoint, marker = Path(shutil.copytree(quantized, tmp_path / "checkpoint")), tmp_path / "marker"
    place(checkpoint, marker)
    (found,) = run_ranks(restored, 1, checkpoint)
    assert found == run_ranks(restored, 1, quantized)[0]
    assert found[1] > 0
    assert not marker.exists()


@pytest.mark.parametrize("place", [in_modelopts_state, in_an_object, in_the_bytes_of_an_object])
@pytest.mark.parametrize("forced", [False, True])
def test_pickles_that_would_run_are_refused(
    forced: bool,
    place: Callable[[Path, Path], None],
    quantized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, marker = Path(shutil.copytree(quantized, tmp_path / "checkpoint")), tmp_path / "marker"
    place(checkpoint, marker)
    ((problem, _),) = run_ranks(_restored_by_force if forced else restored, 1, checkpoint)
    assert problem.startswith(str(checkpoint / "weights"))
    assert "cannot be read" in problem
    assert not marker.exists()


def _restored_by_force(checkpoint: Path) -> tuple[str, int]:
    """As :func:`restored`, where the user has torch unpickle what asks for nothing else."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return restored(checkpoint)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_damaged_state_is_told_in_a_line(content: bytes, quantized: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(quantized, tmp_path / "checkpoint"))
    (checkpoint / "weights" / "modelopt_state" / "common.pt").write_bytes(content)
    ((problem, _),) = run_ranks(restored, 1, checkpoint)
    assert problem.startswith(f"{checkpoint}/weights/modelopt_state/common.pt cannot be read as plain data (")
    assert "\n" not in problem
