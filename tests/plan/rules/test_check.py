# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every mistake in a job's arguments is found before anything starts, in one line each, all lines together."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.plan.rules import check_job
from tests.conftest import Demo


def problems_of(
    demo: Demo,
    output: Path,
    *,
    quantization: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
    **task: Any,
) -> list[str]:
    """The problems of a job that is right but for what is given."""
    arguments = {
        "nemo_checkpoint": str(demo.checkpoint),
        "world_size": 1,
        "quantization_config": QuantizationConfig(**(quantization or {})),
        "export_config": ExportConfig(**{"path": str(output), **(export or {})}),
        **task,
    }
    try:
        check_job(**arguments)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_sound_job_is_resolved(demo: Demo, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(output.parent)
    quantization = QuantizationConfig("fp8", "balanced", calibration_dataset=str(demo.calibration))
    job = check_job(
        model_path=str(demo.checkpoint),
        export_config=ExportConfig("out", inference_tp=2),
        quantization_config=quantization,
        calibration_tp=2,
        world_size=4,
        devices=2,
        num_nodes=2,
    )
    assert (job.checkpoint, job.output) == (demo.checkpoint, output)
    assert job.metadata == read_metadata(demo.checkpoint)
    assert job.quantization is quantization
    assert (job.calibration_tp, job.calibration_pp, job.export.inference_tp) == (2, 1, 2)
    assert job.decoder == "llama"
    assert job.quantizes_kv_cache


def test_defaults_apply_where_no_quantization_config_is_given(demo: Demo, output: Path) -> None:
    job = check_job(nemo_checkpoint=demo.checkpoint, export_config=ExportConfig(str(output)), world_size=None)
    assert job.quantization == QuantizationConfig(quality="balanced")


def test_the_users_decoder_type_counts(demo: Demo, output: Path) -> None:
    export = ExportConfig(str(output), decoder_type="gemma", export_format="nemo")
    assert check_job(nemo_checkpoint=demo.checkpoint, export_config=export, world_size=1).decoder == "gemma"


def test_all_problems_come_together_one_line_each(demo: Demo, output: Path) -> None:
    output.mkdir()
    problems = problems_of(
        demo,
        output,
        calibration_tp=3,
        calibration_pp="two",
        tokenizer_path="/no/such/tokenizer",
        quantization={"algorithm": "fp9", "sq_alpha": 2, "calibration_dataset": "/no/such.jsonl"},
        export={"dtype": "float8", "inference_pp": 3},
        legacy_ckpt=1,
    )
    named = [
        "calibration_pp='two' is not valid: it must be a whole number of at least 1",
        "legacy_ckpt=1 is not valid: it must be true or false",
        "quantization_config.algorithm=fp9 is not known: did you mean fp8?",
        "quantization_config.sq_alpha=2 is not valid: it must be a number from 0 to 1",
        "export_config.dtype=float8 is not known: did you mean float16?",
        "tokenizer_path=/no/such/tokenizer does not exist",
        "calibration_tp=3 does not divide",
        "quantization_config.calibration_dataset=/no/such.jsonl cannot be read",
        "export_config.inference_pp=3 does not divide",
        f"export_config.path={output} exists",
    ]
    assert [problem.startswith(name) for problem, name in zip(problems, named, strict=True)] == [True] * len(named)
    assert not any("\n" in problem for problem in problems)


def test_what_is_missing_altogether_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_job(world_size=1)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "export_config.path is missing",
        "nemo_checkpoint is missing",
    ]
    assert caught.value.problems[1].endswith("name a NeMo, Hugging Face or Megatron-LM directory")


def test_other_objects_in_place_of_configs_are_refused(demo: Demo) -> None:
    with pytest.raises(ConfigError) as caught:
        check_job(nemo_checkpoint=demo.checkpoint, quantization_config="fp8", export_config={"path": "x"}, world_size=1)  # type: ignore[arg-type]
    assert [problem.rpartition(" ")[2] for problem in caught.value.problems] == ["QuantizationConfig", "ExportConfig"]


def test_an_argument_that_the_task_does_not_have_is_the_callers_mistake(demo: Demo) -> None:
    with pytest.raises(TypeError, match="no argument calibration_dp"):
        check_job(nemo_checkpoint=demo.checkpoint, calibration_dp=2, world_size=2)


def test_two_names_of_the_checkpoint_must_agree(demo: Demo, output: Path) -> None:
    assert problems_of(demo, output, model_path=str(demo.checkpoint)) == []
    (problem,) = problems_of(demo, output, model_path="/other")
    assert problem.endswith("mean the same option: give one of them")


def test_the_problems_of_the_checkpoint_come_along(demo: Demo, output: Path) -> None:
    problems = problems_of(demo, output, nemo_checkpoint=str(demo.checkpoint / "context"), devices=3)
    assert len(problems) == 2
    assert f"give {demo.checkpoint}" in "".join(problems)


def test_checking_needs_neither_torch_nor_nemo(demo: Demo, output: Path) -> None:
    program = (
        "import sys;"
        "from nemo_ptq.plan.rules import check_job; from nemo_ptq.config import ExportConfig;"
        "check_job(nemo_checkpoint=sys.argv[1], export_config=ExportConfig(sys.argv[2]), world_size=1);"
        "print(*{'torch', 'nemo', 'nemo_run', 'megatron'} & sys.modules.keys())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, demo.checkpoint, output],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert result.stdout.split() == []
