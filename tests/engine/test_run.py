# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The whole job on the demo checkpoint, through the task, on one to four ranks."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.quantization.state_header import IN_EXPORT
from nemo_ptq.report.records import read_report
from nemo_ptq.report.write import FILES, REPORT
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint
from tests.conftest import Demo
from tests.files import digests
from tests.matrix import quick_first
from tests.ranks import RankFailed, run_ranks


def run_task(arguments: dict[str, Any]) -> str:
    """Runs ptq() on this rank. Its errors travel as text: only those know their type."""
    from nemo_ptq.task import ptq

    try:
        return ptq(**arguments)
    except ConfigError as error:
        return f"refused: {error}"


def arguments(
    demo: Demo, output: Path, *, algorithm: str = "fp8", inference: tuple[int, int] = (1, 1), **task: Any
) -> dict[str, Any]:
    quantization = {"calibration_dataset_size": 32, "calibration_batch_size": 8, "calibration_seq_len": 64}
    quantization |= {"calibration_dataset": str(demo.calibration), "algorithm": algorithm, "quality": "fast"}
    quantization |= task.pop("quantization", {})
    export = task.pop("export", {})
    return {
        "nemo_checkpoint": str(demo.checkpoint),
        "quantization_config": QuantizationConfig(**quantization),
        "export_config": ExportConfig(path=str(output), inference_tp=inference[0], inference_pp=inference[1], **export),
        **task,
    }


def export_all(tasks: list[dict[str, Any]]) -> None:
    """Calibrates once, for the first task, and exports for every one."""
    from dataclasses import replace

    from nemo_ptq.engine.run import run_job
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.plan.rules import check_job

    first, *others = [check_job(**task, world_size=read_launch().world_size) for task in tasks]
    run_job(first)
    is_calibrated = first.quantization.algorithm_name != NO_QUANT
    for job in others:
        run_job(replace(job, calibration_state=first.output / IN_EXPORT if is_calibrated else None))


# Files of the report with times and memory in them: of all, only they differ between runs on the same inputs.
TIMED = {"ptq/report.json", "ptq/report.html"}


def merged(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.tensor(name).reshape(-1).view(torch.uint8) for name in checkpoint.names()}


def assert_same_tensors(left: Path, right: Path) -> None:
    ours, theirs = merged(left), merged(right)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def test_output_is_whole_verified_and_reproducible(demo: Demo, tmp_path: Path) -> None:
    before = digests(demo.checkpoint)
    run_ranks(run_task, 1, arguments(demo, tmp_path / "out"))
    first = digests(tmp_path / "out")
    assert all(check.ok for check in verify(tmp_path / "out", load_tokenizer=True))
    assert {"config.json", "rank0.safetensors", "ptq/manifest.json", "ptq/calibration.safetensors"} <= first.keys()
    assert {str(file) for file in FILES} <= first.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    run_ranks(run_task, 1, arguments(demo, tmp_path / "out", export={"overwrite": True}))
    second = digests(tmp_path / "out")
    # The report tells how long steps took; it and the manifest repeat the arguments, and this run may overwrite.
    assert {name for name in first if first[name] != second[name]} <= {"ptq/manifest.json", *TIMED}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digests(demo.checkpoint) == before


@pytest.mark.parametrize(
    "algorithm", quick_first(["no_quant", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"], ("w4a8_awq",))
)
def test_any_calibration_layout_goes_to_any_inference_layout(demo: Demo, tmp_path: Path, algorithm: str) -> None:
    # At TP 4 the demo's shards are narrower than what INT4's and NVFP4's readers take.
    wide = (2, 2) if algorithm in ("int4_awq", "w4a8_awq", "nvfp4") else (4, 1)
    tasks = [
        arguments(
            demo,
            tmp_path / "x".join(map(str, inference)),
            algorithm=algorithm,
            inference=inference,
            calibration_tp=2,
            calibration_pp=2,
        )
        for inference in [(1, 1), (2, 1), (1, 2), wide]
    ]
    run_ranks(export_all, 4, tasks, timeout=600)
    first, *others = [Path(task["export_config"].path) for task in tasks]
    for other in others:
        assert_same_tensors(first, other)


def test_data_parallel_ranks_read_different_samples_and_agree(demo: Demo, tmp_path: Path) -> None:
    run_ranks(run_task, 1, arguments(demo, tmp_path / "alone"))
    run_ranks(run_task, 2, arguments(demo, tmp_path / "shared"))
    assert digests(tmp_path / "alone")["rank0.safetensors"] == digests(tmp_path / "shared")["rank0.safetensors"]


def test_more_ranks_than_samples(demo: Demo, tmp_path: Path) -> None:
    quantization = {"calibration_dataset_size": 1, "evaluation_dataset_size": 0}
    run_ranks(run_task, 2, arguments(demo, tmp_path / "out", quantization=quantization))
    report = read_report(tmp_path / "out" / REPORT)
    assert report.quality is None
    assert report.missing["quality"] == "turned off: quantization_config.evaluation_dataset_size=0"
    assert all(layer.weight_sqnr_db and layer.input_sqnr_db is None for layer in report.layers)
    assert [step.name for step in report.steps] == ["load", "calibrate", "export", "measure"]


def test_kv_cache_can_be_turned_off(demo: Demo, tmp_path: Path) -> None:
    for enabled in (True, False):
        output = tmp_path / str(enabled)
        run_ranks(run_task, 1, arguments(demo, output, quantization={"enable_kv_cache": enabled}))
        config = json.loads((output / "config.json").read_text())
        assert config["quantization"]["kv_cache_quant_algo"] == ("FP8" if enabled else None)
        names = open_checkpoint(output).rank_files[0].header
        assert any("kv_cache_scaling_factor" in name for name in names) == enabled


def test_half_precision(demo: Demo, tmp_path: Path) -> None:
    run_ranks(run_task, 1, arguments(demo, tmp_path / "out", export={"dtype": "fp16"}))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert open_checkpoint(tmp_path / "out").tensor("lm_head.weight").dtype == torch.float16


def short_data(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": "def f(x):\n    return x" * (1 + i)}) + "\n" for i in range(3)))
    return path


def printed_by_task(arguments: dict[str, Any]) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        run_task(arguments)
    return printed.getvalue()


def test_a_small_data_set_is_used_whole(demo: Demo, tmp_path: Path) -> None:
    data = short_data(tmp_path / "three.jsonl")
    task = arguments(demo, tmp_path / "out", quantization={"calibration_dataset": str(data)})
    (printed,) = run_ranks(printed_by_task, 1, task)
    assert "has 3 samples, fewer than the 32 asked" in printed
    assert "blocks: 6/6 blocks" in printed
    quality = read_report(tmp_path / "out" / REPORT).quality
    assert quality is not None
    assert (quality.documents, quality.held_out) == (3, False)


def loop_of_ones_own(module: torch.nn.Module) -> None:
    from nemo_ptq.calibration.forward import run_batches

    for _ in run_batches(module, [torch.arange(64).reshape(2, 32)]):
        pass


def test_a_loop_of_ones_own_leaves_figures_out(demo: Demo, tmp_path: Path) -> None:
    run_ranks(run_task, 1, arguments(demo, tmp_path / "out", forward_loop=loop_of_ones_own))
    report = read_report(tmp_path / "out" / REPORT)
    assert report.quality is report.command is None
    assert "forward_loop" in report.missing["activations"]
    assert report.arguments["forward_loop"] == "loop_of_ones_own"


def test_a_list_of_formats_makes_a_subdirectory_of_each(demo: Demo, tmp_path: Path) -> None:
    alone = arguments(demo, tmp_path / "alone")
    several = arguments(demo, tmp_path / "several", export={"export_format": "[trtllm]", "overwrite": True})
    run_ranks(export_all, 1, [alone, several, several])
    assert [entry.name for entry in (tmp_path / "several").iterdir()] == ["trtllm"]
    ours, expected = digests(tmp_path / "several" / "trtllm"), digests(tmp_path / "alone")
    # The manifest and the report repeat the arguments.
    assert {name for name in expected if ours[name] != expected[name]} <= {"ptq/manifest.json", *map(str, FILES)}


def refuse_config(arguments: dict[str, Any]) -> str:
    """Runs a job whose exported files do not pass the verification."""
    from unittest.mock import patch

    from nemo_ptq.task import ptq

    broken = {"architecture": "NobodyForCausalLM"}
    with patch("nemo_ptq.export.trtllm.trtllm_writer.qnemo_config", lambda *_: broken):
        try:
            ptq(**arguments)
        except PtqError as error:
            return str(error)
    return "published"


def test_nothing_appears_when_the_verification_fails(demo: Demo, tmp_path: Path) -> None:
    (message,) = run_ranks(refuse_config, 1, arguments(demo, tmp_path / "out"))
    assert "does not pass its own verification" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out.calibration.safetensors"]


def die_during_export(arguments: dict[str, Any]) -> None:
    """Rank 1 dies while the others wait for its shards."""
    import os
    from unittest.mock import patch

    from nemo_ptq.task import ptq

    def die(*_: Any, **__: Any) -> None:
        os._exit(3)

    if os.environ["RANK"] == "1":
        with patch("nemo_ptq.export.stream.LayoutWriter.write", die):
            ptq(**arguments)
    ptq(**arguments)


def test_a_lost_rank_leaves_no_output(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(die_during_export, 2, arguments(demo, tmp_path / "out", calibration_tp=2))
    assert not (tmp_path / "out").exists()


def test_manifest_says_how_to_repeat_the_run(demo: Demo, tmp_path: Path) -> None:
    task = arguments(demo, tmp_path / "out")
    run_ranks(run_task, 1, task)
    manifest = json.loads((tmp_path / "out" / "ptq" / "manifest.json").read_text())
    assert manifest["arguments"]["quantization_config"] == asdict(task["quantization_config"])
    # Whether a run was continued, and for which server it was checked, is no part of what it makes.
    assert manifest["arguments"]["export_config"] | {"resume": False, "server": None} == asdict(task["export_config"])
    assert {"nvidia-modelopt", "megatron-core", "torch"} <= manifest["producer"].keys()
