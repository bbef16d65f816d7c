# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Planned rank files have the sizes of those that the exporter writes."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.export.safetensors_stream import SafetensorsStream, TensorSpec
from nemo_ptq.export.trtllm.trtllm_layout import QnemoLayout
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec
from nemo_ptq.plan.files import FileSize, context_files, rank_files, reader_config
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
        SafetensorsStream(path, specs, {"rank": str(rank)})
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
