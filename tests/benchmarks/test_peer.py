# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's own path, as the benchmark runs it: on our batches, with the presets that our algorithms stand for."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peer import FORWARD, PRESETS, preset, read_batches, run
from nemo_ptq.config import QuantizationConfig
from nemo_ptq.quantization.presets import preset_config
from tests.families import make_hf

_TEXTS = ["one two three four five six", "the quick brown fox jumps over the dog", "for index in range(10)"] * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf("llama3", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in _TEXTS))
    return str(file)


def _path(model: Path, output: Path, dataset: str, algorithm: str) -> list[str]:
    sizes = {"samples": 8, "seq_len": 5, "batch_size": 4, "block_size": None}
    return [
        step.name for step in run(Namespace(model=model, output=output, dataset=dataset, algorithm=algorithm, **sizes))
    ]


def test_the_path_ends_with_an_fp8_export(model: Path, dataset: str, tmp_path: Path) -> None:
    assert _path(model, tmp_path, dataset, "fp8") == ["load", "calibrate", "export"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.1.self_attn.k_proj.k_scale"] > 0


def test_the_bare_forward_pass_writes_nothing(model: Path, dataset: str, tmp_path: Path) -> None:
    assert _path(model, tmp_path, dataset, FORWARD) == ["load", "calibrate"]
    assert list(tmp_path.iterdir()) == []


def test_the_batches_hold_the_first_tokens_of_as_many_samples(model: Path, dataset: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = read_batches(tokenizer, dataset, samples=8, seq_len=5, batch_size=4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 5), (4, 5)]
    assert torch.cat(batches).tolist() == [tokenizer(text)["input_ids"][:5] for text in _TEXTS[:8]]


@pytest.mark.parametrize("algorithm", PRESETS)
def test_it_quantizes_what_a_job_quantizes(algorithm: str) -> None:
    def quantizers(config: dict) -> set[str]:
        return {entry["quantizer_name"] for entry in config["quant_cfg"] if entry.get("enable", True)}

    ours = preset_config(QuantizationConfig(algorithm), "llama")
    assert quantizers(preset(algorithm)) == quantizers(ours)


def test_int4_has_groups_of_the_size_that_is_asked_for() -> None:
    def sizes(config: dict) -> list[int]:
        return [each["cfg"]["block_sizes"][-1] for each in config["quant_cfg"] if "block_sizes" in each.get("cfg", {})]

    assert sizes(preset("int4_awq", 64)) == [64]
    assert sizes(preset("int4_awq")) == [128]
