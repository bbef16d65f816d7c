# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The reader's logits of Hugging Face directories against transformers', which has saved them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.forward_pass import logits, open_model
from tests.families import TELLING, make_hf
from tests.verify.qnemo_writer import Recipe
from tests.verify.reference import FAMILIES, VOCAB, build, reference_logits

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.randint(VOCAB, (6, 24), generator=torch.Generator().manual_seed(7))


def compare(model: PreTrainedModel, directory: Path) -> None:
    expected = reference_logits(model, TOKENS, Recipe())
    assert expected.std() > 0.2
    assert (logits(directory, TOKENS) - expected).abs().max() < 2e-4


# StableLM, which stands for NeMo's GPT there, is no family of a Hugging Face directory.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_swiglu"])
def test_logits_are_transformers_own(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    compare(model, tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "phi3", "gemma2", "gemma3"])
def test_what_only_some_families_compute(family: str, tmp_path: Path) -> None:
    """Biases and norms of queries and keys, fused layers, windows and rotary embeddings by layer, caps, four norms."""
    make_hf(family, tmp_path, dtype="float32", **TELLING[family])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert expected.std() > 0.1
    assert (logits(tmp_path, TOKENS) - expected).abs().max() < 2e-4 * expected.abs().max()


LONGROPE = {"type": "longrope", "short_factor": [1.0 + n / 8 for n in range(16)], "long_factor": [3.0] * 16}


@pytest.mark.parametrize("context", [256, 16])
def test_longrope(context: int, tmp_path: Path) -> None:
    """The tokens are fewer than the model was trained on first, or more."""
    make_hf("phi3", tmp_path, dtype="float32", rope_scaling=LONGROPE, original_max_position_embeddings=context)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert 16 < TOKENS.shape[1] < 256
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert (logits(tmp_path, TOKENS) - expected).abs().max() < 2e-4 * expected.abs().max()
    for wrong in ({"short_factor": [1.0] * 15}, {"long_factor": [-1.0] * 16}, {"mscale": 1.0}):
        edit(tmp_path, rope_scaling=None, rope_parameters={"rope_theta": 10000.0, **LONGROPE, **wrong})
        with pytest.raises(PtqError, match="expected short_factor and long_factor of 16 positive numbers each"):
            open_model(tmp_path)
    edit(tmp_path, rope_parameters={**LONGROPE, "original_max_position_embeddings": 8})
    with pytest.raises(PtqError, match=f"has original_max_position_embeddings {context}, expected one number"):
        open_model(tmp_path)


def test_files_of_older_days(tmp_path: Path) -> None:
    model = build("llama3")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    compare(model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(PtqError, match=r"pytorch_model.bin: not readable as tensors"):
        logits(tmp_path, TOKENS)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Gives every parameter random numbers, biases included."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.float().eval()


def test_heads_that_are_fused_one_by_one(tmp_path: Path) -> None:
    """StarCoder 1 without multi-query attention."""
    sizes: dict[str, Any] = {"n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPTBigCodeConfig(vocab_size=VOCAB, multi_query=False, attn_implementation="eager", **sizes)
    model = spread(GPTBigCodeForCausalLM(config))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)


def test_gelu_is_exact_where_the_file_says_so(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    config = Starcoder2Config(vocab_size=VOCAB, hidden_act="gelu", attn_implementation="eager", **sizes, **heads)
    model = spread(Starcoder2ForCausalLM(config))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    edit(tmp_path, hidden_act="gelu_pytorch_tanh")
    assert (logits(tmp_path, TOKENS) - reference_logits(model, TOKENS, Recipe())).abs().max() > 2e-4


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def saved(family: str, directory: Path) -> PreTrainedModel:
    model = build(family)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", ["llama3", "llama_linear", "nemotron"])
def test_the_spelling_of_transformers_5_is_the_same_model(family: str, tmp_path: Path) -> None:
    model, file = saved(family, tmp_path), tmp_path / "config.json"
    config = json.loads(file.read_text())
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    parameters = {name: config.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in config}
    file.write_text(json.dumps({**config, "rope_parameters": {**parameters, **scaling}}))
    compare(model, tmp_path)
    assert open_model(tmp_path).config.rotary_pct == getattr(model.config, "partial_rotary_factor", 1.0)


def test_a_window_of_attention(tmp_path: Path) -> None:
    """Sequences are longer than the window, so that what it leaves out is seen."""
    config = MistralConfig(**SIZES, sliding_window=7, attn_implementation="eager")
    model = spread(MistralForCausalLM(config))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    edit(tmp_path, sliding_window=8)
    assert (logits(tmp_path, TOKENS) - reference_logits(model, TOKENS, Recipe())).abs().max() > 2e-4


def test_gemma_computes_what_transformers_reads(tmp_path: Path) -> None:
    """Early files say gelu, which transformers takes at its word."""
    model = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=32, hidden_act="gelu", attn_implementation="eager"))
    model = spread(model)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    edit(tmp_path, hidden_act="gelu_pytorch_tanh")
    assert (logits(tmp_path, TOKENS) - reference_logits(model, TOKENS, Recipe())).abs().max() > 2e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"residual_multiplier": 0.2}, "has residual_multiplier 0.2, which the reader does not know"),
        ({"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}, "has rope_theta 10000.0 and 20000.0 in"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "has rope_scaling with mscale"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 0.7}},
            "scaling with attention_fa",
        ),
        ({"rope_scaling": {**LONGROPE, "factor": 2.0}}, "'longrope', expected linear, llama3 or a Phi's longrope"),
        ({"architectures": ["FalconForCausalLM"]}, "is of architecture FalconForCausalLM, not one of LlamaForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not one of"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn', expected linear, "),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method 'magic' is not known"),
        ({"model_type": "nothing"}, "is of no model that transformers knows"),
    ],
)
def test_what_cannot_be_run_says_why(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(PtqError, match=said):
        open_model(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PtqError, match=r"the weights lack model.layers.1.mlp.up_proj.weight"):
        logits(tmp_path, TOKENS)
    file.unlink()
    with pytest.raises(PtqError, match="has no weights"):
        logits(tmp_path, TOKENS)
