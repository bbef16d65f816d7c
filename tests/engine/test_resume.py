# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A job that was killed between two blocks goes on from there, to the bytes and figures of one that was not."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.export.leftover import find_leftover
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import REPORT
from tests.conftest import Demo
from tests.engine.test_run import TIMED, arguments, run_task
from tests.files import digests
from tests.ranks import RankFailed, run_ranks

FINISHED = 3


@contextmanager
def impatient() -> Iterator[None]:
    """Has the journal written after every block, as on a model whose blocks take long."""
    from unittest.mock import patch

    journal = "nemo_ptq.engine.journal"
    with patch(f"{journal}._LEAST_SECONDS", 0.0), patch(f"{journal}._PATIENCE", 0.0):
        yield


def die_between_blocks(task: dict[str, Any], finished: int = FINISHED) -> None:
    """Dies without a word once some blocks are finished."""
    from unittest.mock import patch

    from nemo_ptq.engine.journal import Journal
    from nemo_ptq.task import ptq

    write = Journal.write

    def write_and_die(journal: Journal, progress: Any) -> None:
        write(journal, progress)
        if progress.next_block == finished:
            os._exit(3)

    with impatient(), patch.object(Journal, "write", write_and_die):
        ptq(**task)


def said_by(task: dict[str, Any]) -> str:
    """What a job says, or why it cannot be run."""
    with redirect_stdout(io.StringIO()) as printed:
        try:
            run_task(task)
        except PtqError as error:
            return f"refused: {error}"
    return printed.getvalue()


@pytest.mark.parametrize(
    ("algorithm", "quality", "tp", "pp"),
    [
        pytest.param("int4_awq", "fast", 1, 1, marks=pytest.mark.slow),
        ("int8_sq", "balanced", 1, 1),
        pytest.param("int4_awq", "max", 1, 1, marks=pytest.mark.slow),
        pytest.param("int8_sq", "fast", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_the_result_is_that_of_a_run_that_was_not_killed(
    algorithm: str, quality: str, tp: int, pp: int, demo: Demo, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "algorithm": algorithm,
        "quantization": {"quality": quality},
        "calibration_tp": tp,
        "calibration_pp": pp,
    }
    formats = ["trtllm", "compressed_tensors"]
    run_ranks(run_task, tp * pp, arguments(demo, tmp_path / "whole", export={"export_format": formats}, **options))
    task = arguments(demo, tmp_path / "out", export={"export_format": formats}, **options)
    with pytest.raises(RankFailed, match="died"):
        run_ranks(die_between_blocks, tp * pp, task)
    assert not (tmp_path / "out").exists()
    assert find_leftover(tmp_path / "out") is not None
    task = arguments(demo, tmp_path / "out", export={"export_format": formats, "resume": True}, **options)
    said, *_ = run_ranks(said_by, tp * pp, task)
    assert f"resuming after {FINISHED} of " in said
    expected, found = digests(tmp_path / "whole"), digests(tmp_path / "out")
    # The manifest and the report repeat the arguments.
    different = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    assert {name.partition("/")[2] for name in different} <= {"ptq/manifest.json", "ptq/README.md", *TIMED}
    for name in formats:
        whole, resumed = (read_report(tmp_path / which / name / REPORT) for which in ("whole", "out"))
        assert whole.quality is not None
        assert resumed.quality == whole.quality
        assert resumed.layers == whole.layers
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def run_impatiently(checkpoint: Path, output: Path) -> None:
    from tests import steps

    with impatient():
        steps.run_job(steps.job_of(checkpoint, QuantizationConfig("fp8"), output))


def test_experts_that_share_an_amax_are_journaled(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(run_impatiently, 1, checkpoint_of("mixtral"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_the_same_job_goes_on(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="died"):
        run_ranks(die_between_blocks, 1, arguments(demo, tmp_path / "out"))
    other = arguments(demo, tmp_path / "out", algorithm="int8_sq", export={"resume": True})
    (said,) = run_ranks(said_by, 1, other)
    assert said.startswith("refused: export_config.resume=true cannot continue")
    assert "quantization_config.algorithm was 'fp8' and is 'int8_sq'" in said
    # How the memory is used is no part of the result.
    quantization = {"layerwise": True}
    (said,) = run_ranks(
        said_by, 1, arguments(demo, tmp_path / "out", quantization=quantization, export={"resume": True})
    )
    assert f"resuming after {FINISHED} of " in said
    assert (tmp_path / "out").is_dir()


def test_a_job_killed_after_its_last_block_keeps_its_figures(demo: Demo, tmp_path: Path) -> None:
    run_ranks(run_task, 1, arguments(demo, tmp_path / "whole"))
    blocks = 6  # embedding, four layers, head
    with pytest.raises(RankFailed, match="died"):
        run_ranks(die_between_blocks, 1, arguments(demo, tmp_path / "out"), blocks)
    (said,) = run_ranks(said_by, 1, arguments(demo, tmp_path / "out", export={"resume": True}))
    assert f"resuming after {blocks} of {blocks} blocks" in said
    whole, resumed = (read_report(tmp_path / which / REPORT) for which in ("whole", "out"))
    assert whole.quality is not None
    assert resumed.quality == whole.quality
