# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Whole jobs of the families with parts of their own, by what the data shows, from a Hugging Face directory."""

import json
from pathlib import Path

import pytest
import torch

from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.task import ptq
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance
from tests.families import make_hf
from tests.matrix import MIXTURES, carries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quality"),
    [
        *((family, "balanced") for family in ("qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3")),
        *((family, "max") for family in ("qwen3", "qwen3_moe", "gemma2")),
    ],
)
def test_a_job(family: str, quality: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_hf(family, tmp_path / "hf")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"the quick brown fox jumps {number} times over the dog\n" for number in range(40)))
    algorithm = "fp8" if family in MIXTURES else "int4_awq"
    formats = [name for name in FORMATS if carries(name, family, algorithm) and FORMATS[name].is_packed]
    quantization = QuantizationConfig(
        algorithm,
        quality=quality,
        enable_kv_cache=family != "phi3",
        calibration_dataset=str(texts),
        calibration_dataset_size=32,
        calibration_batch_size=8,
        calibration_seq_len=32,
        evaluation_dataset_size=4,
    )
    ptq(str(source), ExportConfig(str(tmp_path / "out"), export_format=formats), quantization_config=quantization)
    is_compared = "KL divergence on held-out samples: " in "".join(capfd.readouterr())
    assert is_compared == (quality == "max")
    expected = logits(source, TOKENS)
    for name in formats:
        directory = tmp_path / "out" / name
        assert [check for check in verify(directory) if not check.ok] == []
        report = json.loads((directory / "ptq" / "report.json").read_text())
        assert report["summary"]["quality"] == quality
        roundings = {layer["rounding"] for layer in report["layers"]}
        assert roundings == {"gptq"} if quality == "balanced" else roundings <= {"gptq", "nearest"}
        found = logits(directory, TOKENS)
        size = min(found.shape[-1], expected.shape[-1])
        # Random weights: what counts is that it is the same model, roundings apart.
        agreement = torch.nn.functional.cosine_similarity(found[..., :size], expected[..., :size], dim=-1)
        assert agreement.median() > 0.9
        assert distance(found, expected) > 1e-3
