# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job says of servers."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.job import Job
from nemo_ptq.models.spec import LongRope
from nemo_ptq.report.page import render_card
from nemo_ptq.report.records import read_report, to_json
from nemo_ptq.report.serving import server_warnings, serving_of
from tests.plan.models import LLAMA_8B
from tests.report.examples import report


def job(tied: bool, format: str, server: str | None = None) -> Job:
    export = ExportConfig("OUT", export_format=format, server=server)
    model = replace(LLAMA_8B, tied_embeddings=tied)
    return Job(Path("/in"), model, Path("/out"), QuantizationConfig("fp8"), export, "llama")


def test_a_job_warns_of_a_server_that_cannot_tie_embeddings() -> None:
    (line,) = server_warnings(job(True, "hf"))
    assert line.startswith("vLLM 0.24 does not load algorithm=fp8 in export_format=hf: ")
    outcomes = {found.server: found.outcome for found in serving_of(job(True, "hf"), "hf")}
    assert (outcomes["vLLM 0.24"], outcomes["vLLM 0.32"]) == ("refused", "loads")


@pytest.mark.parametrize(
    ("tied", "format", "server"), [(False, "hf", None), (True, "compressed_tensors", None), (True, "hf", "vllm")]
)
def test_a_job_whose_servers_load_it_warns_of_none(tied: bool, format: str, server: str | None) -> None:
    assert server_warnings(job(tied, format, server)) == []


def test_the_card_has_a_request_beside_the_command_of_the_newest_vllm(tmp_path: Path) -> None:
    servers = serving_of(job(False, "hf"), "hf")
    assert [found.server for found in servers if found.request] == ["vLLM 0.32"]
    (tmp_path / "report.json").write_text(to_json(replace(report(), servers=servers)))
    card = render_card(read_report(tmp_path / "report.json"))
    assert "\n```bash\nvllm serve /out\n```\n\nand, from another terminal:\n\n```bash\ncurl http" in card
    assert "\n```bash\ntrtllm-serve /out\n```\n\nWith" in card


def test_a_model_with_longrope_is_told_what_vllm_does_with_it() -> None:
    one = job(False, "hf")
    stretched = replace(one, metadata=replace(one.metadata, long_rope=LongRope((1.0,), (2.0,), 4096, 1.0)))
    notes = {found.server: found.note for found in serving_of(stretched, "hf")}
    assert notes["vLLM 0.32"].startswith("it serves 4096 tokens")
    assert notes["SGLang 0.5.23"] == ""
