# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a model was published with survives into the exports, of a Hugging Face directory and of its import alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_ptq.checkpoint.huggingface.importer import import_hf
from nemo_ptq.checkpoint.huggingface.published import KEPT
from nemo_ptq.config import ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.launch import front
from nemo_ptq.task import ptq
from nemo_ptq.verify.checks import verify
from tests.families import make_hf

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 7, 9], "bos_token_id": 0}
# What the tests give the tiny models beyond what transformers writes; by family.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral": {"max_position_embeddings": 32768, "sliding_window": 128, "eos_token_id": [1, 7, 9]},
    "gemma": {"eos_token_id": [1, 7, 9]},
    "starcoder2": {"sliding_window": 96, "max_position_embeddings": 16384, "hidden_act": "gelu"},
    "llama31": {"eos_token_id": [1, 7, 9], "use_cache": False, "pretraining_tp": 2, "unsloth_version": "2024.9"},
}
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read(path) | changes))


def export(source: Path, output: Path, dtype: str = "bf16") -> Path:
    """A whole job that quantizes nothing, verified."""
    export_config = ExportConfig(str(output), export_format="hf", dtype=dtype)
    ptq(str(source), export_config, quantization_config=QuantizationConfig("no_quant", evaluation_dataset_size=0))
    assert [check for check in verify(output) if not check.ok] == []
    return output


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the Hugging Face directory of a family, with settings of all kinds, once."""
    root = tmp_path_factory.mktemp("published")

    def make(family: str) -> Path:
        directory = root / family
        if not directory.exists():
            make_hf(family, directory)
            edit(directory / "config.json", **PUBLISHED[family])
            (directory / "generation_config.json").write_text(json.dumps(GENERATION))
            (directory / "chat_template.jinja").write_text(TEMPLATE)
        return directory

    return make


@pytest.mark.parametrize("family", sorted(PUBLISHED))
@pytest.mark.parametrize("through", ["hf", "nemo"])
def test_everything_survives(through: str, family: str, source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = source_of(family)
    checkpoint = import_hf(str(source), str(tmp_path / "nemo")) if through == "nemo" else source
    output = export(checkpoint, tmp_path / "out")
    expected = read(source / "config.json")
    if family == "gemma":
        expected |= {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    assert read(output / "config.json") == expected
    generation = read(output / "generation_config.json")
    assert {name: generation.get(name) for name in GENERATION} == GENERATION
    assert load_file(output / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()

    from transformers import AutoTokenizer

    chat = [{"role": "user", "content": "hello"}]
    rendered = AutoTokenizer.from_pretrained(output).apply_chat_template(chat, tokenize=False)
    assert rendered == "[user] hello"


def test_a_quantized_export_adds_its_quantization_alone(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = source_of("mistral")
    (tmp_path / "texts.txt").write_text("the quick brown fox jumps over it\n" * 8)
    quantization = QuantizationConfig(
        "fp8",
        quality="fast",
        calibration_dataset=str(tmp_path / "texts.txt"),
        calibration_dataset_size=4,
        calibration_batch_size=4,
        calibration_seq_len=8,
        evaluation_dataset_size=0,
    )
    formats = ["hf", "compressed_tensors", "trtllm"]
    ptq(
        str(source),
        ExportConfig(str(tmp_path / "out"), export_format=",".join(formats)),
        quantization_config=quantization,
    )
    for format in formats[:2]:
        found = read(tmp_path / "out" / format / "config.json")
        assert found.pop("quantization_config")
        assert found == read(source / "config.json")
    assert read(tmp_path / "out" / "trtllm" / "config.json")["max_position_embeddings"] == 32768


def test_the_new_spelling_is_written_with_the_older_beside_it(tmp_path: Path) -> None:
    source, old = make_hf("llama31", tmp_path / "hf"), export(make_hf("llama31", tmp_path / "old"), tmp_path / "of-old")
    config = read(source / "config.json")
    scaling, theta = config.pop("rope_scaling"), config.pop("rope_theta")
    parameters = {**scaling, "rope_theta": theta}
    edit_to = {**config, "rope_parameters": parameters}
    (source / "config.json").write_text(json.dumps(edit_to))
    found = read(export(source, tmp_path / "out") / "config.json")
    assert found == {**edit_to, "rope_theta": theta, "rope_scaling": scaling}
    weights = [(path / "model.safetensors").read_bytes() for path in (old, tmp_path / "out")]
    assert weights[0] == weights[1]


def test_what_is_about_the_source_alone_is_left_out(tmp_path: Path) -> None:
    source = make_hf("llama2", tmp_path / "hf", dtype="float16")
    content = read(source / "config.json")
    del content["dtype"]
    more = {"_name_or_path": "/home/me/models/x", "auto_map": {"AutoConfig": "code.C"}, "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(content | more))
    assert read(export(source, tmp_path / "out") / "config.json") == {**content, "torch_dtype": "bfloat16"}


def test_a_context_of_another_model_is_not_described_by_the_file_that_was_kept(tmp_path: Path) -> None:
    """NeMo's configuration is what the weights are of."""
    checkpoint = import_hf(str(make_hf("mistral", tmp_path / "hf")), str(tmp_path / "nemo"))
    edit(checkpoint / "context" / KEPT, rope_theta=77.0, eos_token_id=[5, 6])
    found = read(export(checkpoint, tmp_path / "out") / "config.json")
    assert found["rope_theta"] == 10000.0
    assert found["sliding_window"] == 128
    assert found["eos_token_id"] == read(checkpoint.with_name("hf") / "generation_config.json")["eos_token_id"]


def test_without_the_file_the_tokens_are_those_of_the_generation_settings(tmp_path: Path) -> None:
    source = make_hf("mistral", tmp_path / "hf", max_position_embeddings=32768)
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    checkpoint = import_hf(str(source), str(tmp_path / "nemo"))
    (checkpoint / "context" / KEPT).unlink()
    found = read(export(checkpoint, tmp_path / "out") / "config.json")
    assert found["eos_token_id"] == [1, 7, 9]
    assert (found["max_position_embeddings"], found["sliding_window"]) == (32768, 128)
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [1, 7, 9]


@pytest.mark.parametrize("through", ["hf", "nemo"])
def test_float16_weights_are_kept_bit_for_bit(through: str, tmp_path: Path) -> None:
    source = make_hf("llama2", tmp_path / "hf", dtype="float16")
    expected = load_file(source / "model.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().half()) for tensor in expected.values())
    checkpoint = import_hf(str(source), str(tmp_path / "nemo")) if through == "nemo" else source
    found = load_file(export(checkpoint, tmp_path / "out", dtype="fp16") / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_weights_are_rounded_once(dtype: str, tmp_path: Path) -> None:
    source = make_hf("llama2", tmp_path / "hf", dtype="float32")
    rounded = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    expected = {name: tensor.to(rounded) for name, tensor in load_file(source / "model.safetensors").items()}
    found = load_file(export(source, tmp_path / "out", dtype=dtype) / "model.safetensors")
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ({"attention_bias": True}, "has attention_bias True"),
        ({"rms_norm_eps": None}, "has rms_norm_eps None"),
        ({"secret_gate": 1}, "has secret_gate 1"),
    ],
)
def test_plan_and_launch_refuse_alike(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = make_hf("llama2", tmp_path / "hf")
    edit(source / "config.json", **changes)
    arguments = {"nemo_checkpoint": str(source), "export_config": ExportConfig(str(tmp_path / "out"))}
    problems = []
    for door in (front.plan, front.check):
        with pytest.raises(ConfigError) as caught:
            door(arguments, world_size=1)
        problems.append(caught.value.problems)
    assert problems[0] == problems[1]
    assert any(said in problem for problem in problems[0])


def test_a_tokenizer_that_is_longer_than_the_vocabulary_is_found_by_plan_and_launch(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(make_hf("llama2", tmp_path / "hf")))
    source = make_hf("llama2", tmp_path / "exact", vocab_size=tokens)
    arguments = {"nemo_checkpoint": str(source), "export_config": ExportConfig(str(tmp_path / "out"))}
    assert front.plan(arguments, world_size=1).problems == ()
    longer = AutoTokenizer.from_pretrained(source)
    longer.add_special_tokens({"pad_token": "[PAD]"})
    longer.save_pretrained(source)
    (problem,) = front.plan(arguments, world_size=1).problems
    assert f"has token {tokens} ('[PAD]')" in problem
    with pytest.raises(ConfigError, match=r"\[PAD\]"):
        front.check(arguments, world_size=1)


def test_a_gemma_whose_readers_would_differ_does_not_verify(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    output = export(source_of("gemma"), tmp_path / "out")
    for changes in ({"hidden_activation": None}, {"hidden_act": "gelu"}):
        damaged = Path(shutil.copytree(output, tmp_path / "damaged"))
        edit(damaged / "config.json", **changes)
        failed = {check.name: check.detail for check in verify(damaged) if not check.ok}
        assert "both must be 'gelu_pytorch_tanh'" in failed["config.json"]
        shutil.rmtree(damaged)


def test_weights_that_are_not_finite_end_the_job_by_name(tmp_path: Path) -> None:
    source = make_hf("llama2", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][2, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PtqError, match=r"^model\.layers\.1\.self_attn\.k_proj\.weight has values that are not finite"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
