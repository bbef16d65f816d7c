# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The models of docs/models.md: each is the right model, or refused with a line that tells what to do."""

import json
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.plan import plan_job
from nemo_ptq.task import ptq
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, transformers_logits
from tests.families import make_tokenizer, save_random
from tests.models.published import DOCUMENT, MODELS, refusal, render, small

RUNS = [name for name, config in MODELS.items() if refusal(config) is None]


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `python -m tests.models.published`"
    assert len(RUNS) > 15


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(RUNS)))
def test_a_plan_says_why_a_model_is_refused(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    tmp_path.joinpath("config.json").write_text(json.dumps(small(config) if "hidden_act" in config else config))
    with pytest.raises(PtqError) as caught:
        read_metadata(tmp_path)
    assert str(caught.value) == f"nemo_checkpoint: {refusal(config)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_job_makes_the_model_that_transformers_has(name: str, tmp_path: Path) -> None:
    import transformers

    source, out = tmp_path / "hf", tmp_path / "out"
    config = small(MODELS[name])
    made = transformers.AutoConfig.for_model(**config)
    save_random(made, source, "bfloat16", zero_centered=config["model_type"].startswith("gemma"))
    make_tokenizer(source)
    (source / "config.json").write_text(json.dumps(config))  # the settings as they were published
    expected, _ = transformers_logits(source)

    export = ExportConfig(str(out), export_format="hf")
    quantization = QuantizationConfig("fp8", calibration_dataset="builtin", enable_kv_cache=False)
    plan = plan_job(
        {"nemo_checkpoint": str(source), "export_config": export, "quantization_config": quantization}, world_size=1
    )
    assert [rule.problem for rule in plan.rules if rule.problem] == []
    ptq(str(source), export, quantization_config=QuantizationConfig("no_quant"))
    assert distance(logits(out, TOKENS), expected) < 1e-4
    found, report = transformers_logits(out)
    assert report == {} and distance(found, expected) < 1e-4
