# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about families and layers."""

from dataclasses import replace

from nemo_ptq.models.registry import family_of
from nemo_ptq.models.spec import GemmaAttention, LongRope, ModelSpec
from nemo_ptq.plan.rules.model import (
    class_knows_layers,
    family_is_supported,
    long_rope_has_a_format,
    norm_fits_decoder,
    reader_knows_layers,
)
from tests.plan.models import LLAMA_8B
from tests.plan.rules.examples import STARCODER, expect


def test_family() -> None:
    assert family_is_supported(LLAMA_8B, None) is None
    unknown = replace(LLAMA_8B, config_class="my.OwnConfig")
    expect(family_is_supported(unknown, None), "OwnConfig")
    assert family_is_supported(unknown, "llama") is None
    expect(family_is_supported(replace(LLAMA_8B, config_class="x.Falcon7BConfig"), None), "not supported")


def test_layers_that_readers_leave_out() -> None:
    def problem(model: ModelSpec, decoder: str = "llama", format: str = "trtllm") -> str | None:
        return reader_knows_layers(model, decoder, (format,))

    assert problem(LLAMA_8B) is None
    assert problem(replace(LLAMA_8B, qkv_bias=True, linear_bias=True)) is None
    assert problem(replace(STARCODER, qkv_bias=True, linear_bias=True), "gpt") is None
    expect(problem(replace(LLAMA_8B, qk_norm=True)), "ignore the norms of queries and keys")
    assert problem(replace(LLAMA_8B, qk_norm=True), format="hf") is None  # said by that format's own check
    assert problem(replace(LLAMA_8B, qk_norm=True), "qwen3") is None
    assert problem(replace(LLAMA_8B, qkv_bias=True), "qwen2") is None
    expect(problem(LLAMA_8B, "qwen3"), "decoder qwen3 normalises queries and keys")
    expect(problem(replace(LLAMA_8B, qkv_bias=True, linear_bias=True), "qwen2"), "query-key-value projection at most")
    expect(problem(replace(LLAMA_8B, rotary_percent=0.5)), "rotates whole heads")
    gemma = replace(LLAMA_8B, activation="gelu", gemma=GemmaAttention(256, 50.0, 30.0, 4096, 2, None))
    assert problem(gemma, "gemma2") is None
    expect(problem(gemma, "gemma"), "set export_config.decoder_type to one that fits it, which is gemma2")
    expect(problem(replace(LLAMA_8B, activation="gelu"), "gemma2"), "computes other norms, caps or windows")
    third = replace(LLAMA_8B, activation="gelu", gemma=GemmaAttention(256, None, None, 512, 6, 1e4), qk_norm=True)
    assert problem(third, "gemma3") is None
    expect(problem(replace(third, rotary_linear_factor=8.0), "gemma3"), "rope_scaling_factor=8.0")
    alone = replace(LLAMA_8B, qk_norm=True, num_query_groups=LLAMA_8B.num_attention_heads)
    expect(problem(alone, "qwen3"), "take the rows of queries and keys for others")
    expect(problem(replace(LLAMA_8B, qkv_bias=True)), "wants a bias on the query-key-value projection and the output")


def test_longrope_goes_into_hugging_face_directories() -> None:
    model = replace(LLAMA_8B, long_rope=LongRope((1.0,), (2.0,), 4096, 1.2))
    assert long_rope_has_a_format(LLAMA_8B, ("trtllm", "nemo")) is None
    assert long_rope_has_a_format(model, ("hf", "compressed_tensors")) is None
    expect(long_rope_has_a_format(model, ("hf", "trtllm")), "decoder llama have no place for the factors; use")
    expect(long_rope_has_a_format(model, ("nemo",)), "NeMo's Phi3Config has no fields for its factors; use")


def test_activations_that_readers_do_not_compute() -> None:
    def problem(decoder: str, **changes: object) -> str | None:
        return reader_knows_layers(replace(LLAMA_8B, **changes), decoder, ("trtllm",))

    expect(problem("llama", activation="gelu"), "decoder llama has a gated MLP with silu")
    expect(problem("llama", gated_mlp=False), "gated_linear_unit=False with activation function silu")
    expect(problem("gemma"), "decoder gemma has a gated MLP with gelu")
    expect(problem("gpt", activation="squared-relu"), "decoder gpt has no gate for it")
    expect(problem("gpt", activation="quick_gelu"), "quick_gelu is not supported; supported: gelu, silu, squared-relu")
    assert problem("gpt", activation="squared-relu", gated_mlp=False) is None
    expect(problem("llama", num_experts=3, linear_bias=True, qkv_bias=True), "add_bias_linear=True with 3 experts")


def test_a_class_of_hugging_faces_has_its_own_layers() -> None:
    def problem(family: str, **changes: object) -> str | None:
        return class_knows_layers(replace(LLAMA_8B, **changes), family_of(family), ("hf",))

    assert problem("LlamaConfig") is None
    assert problem("Qwen2Config", qkv_bias=True) is None
    expect(problem("LlamaConfig", qk_norm=True), "Hugging Face's LlamaForCausalLM cannot have qk_norm True")
    expect(problem("LlamaConfig", rotary_percent=0.5, gated_mlp=False), "cannot have gated_mlp False, rotary_percent")
    assert class_knows_layers(replace(LLAMA_8B, qk_norm=True), family_of("LlamaConfig"), ("trtllm",)) is None
    assert class_knows_layers(LLAMA_8B, family_of("GPTConfig"), ("hf",)) is None  # another rule's


def test_norm() -> None:
    assert norm_fits_decoder(LLAMA_8B, "llama", ("trtllm",)) is None
    assert norm_fits_decoder(STARCODER, "gpt", ("trtllm",)) is None
    expect(norm_fits_decoder(LLAMA_8B, "gpt", ("hf", "trtllm")), "decoder gpt only LayerNorm")
    assert norm_fits_decoder(LLAMA_8B, "gpt", ("hf",)) is None
    expect(norm_fits_decoder(replace(LLAMA_8B, normalization="LayerNorm"), "llama", ("trtllm",)), "llama only RMSNorm")
