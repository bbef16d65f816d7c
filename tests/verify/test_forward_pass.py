# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The reader's logits against transformers' models of the same weights, plain and with fake quantization."""

import json
import re
from pathlib import Path

import pytest
import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.forward_pass import logits, stream_logits

from .qnemo_writer import Layer, Model, Recipe, Weights, write_directory
from .reference import FAMILIES, VOCAB, build, fake_quantize, reference_logits, to_model


def tokens(batch: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def compare(tmp_path: Path, family: str, recipe: Recipe) -> torch.Tensor:
    """Absolute differences of the logits; the reference's own have a standard deviation of the order of one."""
    reference = build(family)
    model = to_model(family, reference)
    directory = write_directory(tmp_path / "qnemo", model, recipe)
    if recipe.algorithm != "no_quant":
        fake_quantize(family, reference, model, recipe)
    expected = reference_logits(reference, tokens(), recipe)
    assert expected.std() > 0.2
    return (logits(directory, tokens()) - expected).abs()


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_logits_are_those_of_the_original(tmp_path: Path, family: str) -> None:
    assert compare(tmp_path, family, Recipe()).max() < 2e-4


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("family", ["llama_tied", "gemma", "starcoder", "mixtral"])
def test_the_layout_of_ranks_does_not_matter(tmp_path: Path, family: str, tp: int, pp: int) -> None:
    assert compare(tmp_path, family, Recipe(tp=tp, pp=pp)).max() < 2e-4


# One family for each pairing of decoder, norm, gate and bias; llama3 has scaled rotary embeddings.
@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"])
@pytest.mark.parametrize("family", ["llama3", "gemma", "nemotron", "gpt_swiglu", "starcoder2"])
def test_quantized_logits_are_those_of_fake_quantization(tmp_path: Path, family: str, algorithm: str) -> None:
    assert_equal_but_for_ties(compare(tmp_path, family, Recipe(algorithm, tp=2)))


@pytest.mark.parametrize("algorithm", ["no_quant", "fp8"])
@pytest.mark.parametrize("family", ["mixtral", "llama3"])
def test_the_kv_cache_is_quantized(tmp_path: Path, family: str, algorithm: str) -> None:
    recipe = Recipe(algorithm, tp=2, kv_cache="FP8", kv_scale=0.01)
    assert_equal_but_for_ties(compare(tmp_path, family, recipe))


def assert_equal_but_for_ties(difference: torch.Tensor) -> None:
    # A value on the border of two codes may round either way, and then changes the positions that see it, by a
    # fraction of what quantization itself does.
    assert difference.median() < 1e-5
    assert difference.mean() < 1e-2


@pytest.mark.parametrize("algorithm", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4", "fp8 cache"])
def test_quantization_leaves_a_trace(tmp_path: Path, algorithm: str) -> None:
    """Guards the tests above: quantized and unquantized logits are not the same."""
    recipe = Recipe(kv_cache="FP8", kv_scale=0.1) if algorithm == "fp8 cache" else Recipe(algorithm)
    model = to_model("llama", build("llama"))
    plain = logits(write_directory(tmp_path / "plain", model, Recipe()), tokens())
    quantized = logits(write_directory(tmp_path / "quantized", model, recipe), tokens())
    assert (quantized - plain).abs().mean() > 5e-3


def test_int8_kv_cache_rounds_to_integers_of_its_scale(tmp_path: Path) -> None:
    model = to_model("llama", build("llama"))
    plain = logits(write_directory(tmp_path / "plain", model, Recipe()), tokens())
    fine = logits(write_directory(tmp_path / "fine", model, Recipe(kv_cache="INT8", kv_scale=0.1)), tokens())
    coarse = logits(write_directory(tmp_path / "coarse", model, Recipe(kv_cache="INT8", kv_scale=0.4)), tokens())
    assert 0 < 3 * (fine - plain).abs().mean() < (coarse - plain).abs().mean()


def test_excluded_modules_match_the_names_in_the_ranks_file(tmp_path: Path) -> None:
    """With two stages of one layer each, "layers.0" is in both, and "layers.1" in none."""
    recipe = Recipe("fp8", pp=2, exclude=("lm_head", "transformer.layers.0.mlp.fc", "transformer.layers.1.mlp.proj"))
    reference = build("nemotron")
    model = to_model("nemotron", reference)
    directory = write_directory(tmp_path / "qnemo", model, recipe)
    fake_quantize("nemotron", reference, model, recipe)
    for layer in reference.model.layers:
        layer.mlp.up_proj._forward_pre_hooks.clear()
    expected = reference_logits(reference, tokens(), recipe)
    assert_equal_but_for_ties((logits(directory, tokens()) - expected).abs())


def test_bfloat16_weights_are_computed_with_in_float32(tmp_path: Path) -> None:
    reference = build("starcoder2")
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    directory = write_directory(tmp_path / "qnemo", to_model("starcoder2", reference), Recipe(dtype="bfloat16"))
    assert (logits(directory, tokens()) - reference_logits(reference, tokens(), Recipe())).abs().max() < 2e-4


def test_batches_of_other_lengths_do_not_mix(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "qnemo", to_model("llama", build("llama")), Recipe("fp8"))
    batches = [tokens(1, 9), tokens(3, 17), tokens(1, 2)]
    for batch, found in zip(batches, stream_logits(directory, batches), strict=True):
        assert found.shape == (*batch.shape, VOCAB) and found.dtype == torch.float32
        torch.testing.assert_close(found, logits(directory, batch))


def test_gemma_scales_embeddings_in_the_models_dtype(tmp_path: Path) -> None:
    """A model without layers' contributions and with a large epsilon, so that the scale of the embedding is seen."""
    hidden_size, zeros = 192, torch.zeros
    norm = (torch.ones(hidden_size), None)
    linears = {
        "attention.qkv": Weights(zeros(3 * 64, hidden_size)),
        "attention.dense": Weights(zeros(hidden_size, 64)),
        "mlp.fc": Weights(zeros(64, hidden_size)),
        "mlp.gate": Weights(zeros(64, hidden_size)),
        "mlp.proj": Weights(zeros(hidden_size, 64)),
    }
    sizes = {"hidden_size": hidden_size, "intermediate_size": 64, "head_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "norm_epsilon": 100.0}
    table = torch.randn(VOCAB, hidden_size, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    config = to_model("gemma", build("gemma")).config | sizes | heads
    model = Model(config, table, (Layer(norm, norm, linears),), norm, None)
    directory = write_directory(tmp_path / "qnemo", model, Recipe(dtype="bfloat16"))
    hidden = table[tokens()] * 13.875  # The square root of 192 is 13.8564, in bfloat16 13.875.
    expected = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 100) @ table.T
    torch.testing.assert_close(logits(directory, tokens()), expected)


@pytest.mark.parametrize(
    "bad, said",
    [
        (torch.zeros(4, dtype=torch.int64), "expected int64 (batch, seq)"),
        (torch.zeros(1, 4), "expected int64 (batch, seq)"),
        (torch.full((1, 4), VOCAB), "outside the vocabulary of 131"),
        (torch.full((1, 4), -1), "outside the vocabulary of 131"),
        (torch.zeros(1, 98, dtype=torch.int64), "more than the 97 positions"),
    ],
)
def test_impossible_tokens_are_refused(tmp_path: Path, bad: torch.Tensor, said: str) -> None:
    directory = write_directory(tmp_path / "qnemo", to_model("starcoder", build("starcoder")), Recipe())
    with pytest.raises(PtqError, match=re.escape(said)):
        logits(directory, bad)


def test_a_directory_that_cannot_be_run_says_why(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "qnemo", to_model("llama", build("llama")), Recipe())
    config = json.loads((directory / "config.json").read_text())
    config["hidden_act"], config["quantization"]["quant_algo"] = "gegelu", "FP6"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(PtqError, match=r"FP6.*gegelu"):
        logits(directory, tokens())
