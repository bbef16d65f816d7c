# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Planned rank files have the sizes of those that the exporter writes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError
from nemo_ptq.export.safetensors_stream import SafetensorsStream, TensorSpec
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan import files, plan_job
from nemo_ptq.plan.files import FileSize, context_files, rank_files, reader_config, space_problem
from nemo_ptq.plan.rules import check_job
from tests.conftest import Demo
from tests.export.shapes import families_and_layouts

ALGORITHMS = {
    None: "no_quant",
    "FP8": "fp8",
    "W8A8_SQ_PER_CHANNEL": "int8_sq",
    "W4A16_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "NVFP4": "nvfp4",
}


def metadata_of(family: Family, layout: QnemoLayout) -> ModelSpec:
    return replace(layout.shape, config_class=f"{family.nemo_class}Config")


@given(families_and_layouts())
def test_sizes_are_those_of_the_exporter(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[Family, QnemoLayout]
) -> None:
    family, layout = drawn
    algorithms = {scheme.quant_algo for scheme in layout.schemes.values()} or {None}
    (algorithm,) = algorithms
    quantization = QuantizationConfig(ALGORITHMS[algorithm], awq_block_size=16, enable_kv_cache=bool(layout.kv_cache))
    export = ExportConfig("OUT", inference_tp=layout.tensor_parallel, inference_pp=layout.pipeline_parallel)
    assert family.decoder is not None
    planned = list(rank_files(reader_config(metadata_of(family, layout), family.decoder, quantization, export)))
    assert [file.name for file in planned] == [f"rank{rank}.safetensors" for rank in range(layout.world_size)]
    for rank, file in enumerate(planned):
        specs = [TensorSpec(t.name, t.dtype, t.shape) for block in layout.blocks(rank) for t in block]
        path = tmp_path_factory.mktemp("files") / file.name
        SafetensorsStream(path, specs, {"rank": str(rank)}).wait()
        assert path.stat().st_size == file.bytes
        path.unlink()


def test_each_format_has_the_context_in_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "context" / "nemo_tokenizer").mkdir(parents=True)
    (tmp_path / "context" / "io.json").write_bytes(b"x" * 10)
    (tmp_path / "context" / "nemo_tokenizer" / "tokenizer.json").write_bytes(b"x" * 32)

    def planned(formats: str | list[str]) -> list[FileSize]:
        return list(context_files(tmp_path, ExportConfig("OUT", formats)))

    assert planned("trtllm") == [FileSize("nemo_context/", 42, exact=False)]
    assert planned("nemo") == [FileSize("context/", 42, exact=False)]
    assert planned("hf") == [FileSize("tokenizer*", 32, exact=False)]
    assert planned(["nemo", "compressed_tensors"]) == [
        FileSize("nemo/context/", 42, exact=False),
        FileSize("compressed_tensors/tokenizer*", 32, exact=False),
    ]
    assert list(context_files(tmp_path / "context", ExportConfig("OUT"))) == []


def free(monkeypatch: pytest.MonkeyPatch, total: int, left: int) -> None:
    usage = SimpleNamespace(total=total, used=total - left, free=left)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)


def test_an_output_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, about = FileSize("rank0.safetensors", 1000), FileSize("nemo_context/", 100, exact=False)
    path = tmp_path / "new" / "out"
    free(monkeypatch, 5000, 1090)
    assert space_problem(path, [exact, about], False) is None  # a size that is about right may be a tenth less
    free(monkeypatch, 5000, 1089)
    assert space_problem(path, [exact, about], False) == (
        f"export_config.path={path}: 1,090 bytes will be written, and the file system of {tmp_path} has only 1,089 "
        "free: remove something there, or choose another directory"
    )
    assert space_problem(path, [exact, about], True) is None  # an earlier run has claimed it
    assert space_problem("/", [], False) is None
    assert space_problem("/no/such/machine/out", [exact, about], False) is None
    free(monkeypatch, 0, 0)
    assert space_problem(path, [exact, about], False) is None  # the file system does not say


@pytest.mark.parametrize("formats", ["trtllm", "[trtllm,hf,nemo]"])
def test_the_checks_of_a_job_and_its_plan_look_at_the_space(
    formats: str, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = ExportConfig(str(tmp_path / "out"), export_format=formats)
    quantization = QuantizationConfig(calibration_dataset=str(demo.calibration))
    arguments = {"nemo_checkpoint": demo.checkpoint, "export_config": export, "quantization_config": quantization}
    check_job(**arguments, world_size=1)
    assert plan_job(arguments, world_size=1).ok
    free(monkeypatch, 10**9, 10**6)
    with pytest.raises(ConfigError, match="bytes will be written, and the file system of"):
        check_job(**arguments, world_size=1)
    (problem,) = plan_job(arguments, world_size=1).problems
    assert "bytes will be written, and the file system of" in problem
