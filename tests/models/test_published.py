# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The models of docs/models.md: each is the right model, or refused with a line that tells what to do."""

import json
from pathlib import Path

import pytest

from nemo_ptq.checkpoint.metadata import read_metadata
from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import PtqError
from nemo_ptq.plan import plan_job
from nemo_ptq.task import ptq
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, transformers_logits
from tests.families import TOKENS as TOKENS_OF_TOKENIZER
from tests.families import make_tokenizer, save_random
from tests.models.published import DOCUMENT, MODELS, NOT_COMPARED, Config, refusal, render, small

BOTH = ("hf", "compressed_tensors")
FORMATS = {NO_QUANT: ("hf",), "fp8": BOTH, "int4_awq": BOTH}
# Relative distance from the unquantized model of a token's logits, in the median: random weights are moved far.
FURTHEST = {NO_QUANT: 1e-4, "fp8": 0.2, "int4_awq": 0.5}
# Models whose tokenizer has a token more than the embedding has rows, for images.
TOKEN_WITHOUT_ROW = ("google/gemma-3-270m", "google/gemma-3-1b-it")
RUNS = [name for name, config in MODELS.items() if refusal(config) is None]


def is_mixture(config: Config) -> bool:
    return "num_local_experts" in config or "num_experts" in config


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `python -m tests.models.published`"
    assert len(RUNS) > 15
    assert set(MODELS) >= NOT_COMPARED


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(RUNS)))
def test_a_plan_says_why_a_model_is_refused(name: str, tmp_path: Path) -> None:
    config = MODELS[name]
    tmp_path.joinpath("config.json").write_text(json.dumps(small(config) if "hidden_act" in config else config))
    with pytest.raises(PtqError) as caught:
        read_metadata(tmp_path)
    assert str(caught.value) == f"nemo_checkpoint: {refusal(config)}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_jobs_make_the_model_that_transformers_has(name: str, tmp_path: Path) -> None:
    import transformers

    source = tmp_path / "hf"
    config = small(MODELS[name])
    if name in TOKEN_WITHOUT_ROW:
        config["vocab_size"] = TOKENS_OF_TOKENIZER
    made = transformers.AutoConfig.for_model(**config)
    save_random(made, source, "bfloat16", zero_centered=config["model_type"].startswith("gemma"))
    make_tokenizer(source)
    if name in TOKEN_WITHOUT_ROW:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens([f"<unused{number}>" for number in range(TOKENS_OF_TOKENIZER - len(tokenizer))])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
        tokenizer.save_pretrained(source)
        assert len(tokenizer) == TOKENS_OF_TOKENIZER + 1
    (source / "config.json").write_text(json.dumps(config))  # the settings as they were published
    expected, _ = transformers_logits(source)

    for algorithm, all_formats in FORMATS.items():
        has_experts_in_four_bits = algorithm == "int4_awq" and is_mixture(config)
        formats = [form for form in all_formats if not (form == "hf" and has_experts_in_four_bits)]
        export = ExportConfig(str(tmp_path / algorithm), export_format=formats)
        quantization = QuantizationConfig(
            algorithm,
            quality="fast",
            calibration_dataset="builtin",
            calibration_dataset_size=8,
            calibration_batch_size=4,
            calibration_seq_len=32,
            evaluation_dataset_size=0,
            enable_kv_cache=False,
        )
        arguments = {"nemo_checkpoint": str(source), "export_config": export, "quantization_config": quantization}
        assert [rule.problem for rule in plan_job(arguments, world_size=1).rules if rule.problem] == []
        ptq(str(source), export, quantization_config=quantization)
        for form in formats:
            out = tmp_path / algorithm / form
            assert [check for check in verify(out) if not check.ok] == []
            found = logits(out, TOKENS)
            assert distance(found, expected) < FURTHEST[algorithm], (algorithm, form)
            if form == "compressed_tensors" or algorithm == NO_QUANT:
                theirs, report = transformers_logits(out)
                assert report == {} and distance(found, theirs) < 1e-4, (algorithm, form)
