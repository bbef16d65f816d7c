# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job says of servers."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.job import Job
from nemo_ptq.report.serving import server_warnings, serving_of
from tests.plan.models import LLAMA_8B


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
