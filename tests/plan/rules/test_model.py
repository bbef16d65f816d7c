# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The rules about families and layers."""

from dataclasses import replace

from nemo_ptq.models.spec import GemmaAttention, ModelSpec
from nemo_ptq.plan.rules.model import family_is_supported, norm_fits_decoder, reader_knows_layers
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
    gemma = replace(LLAMA_8B, gemma=GemmaAttention(256, 50.0, 30.0, 4096, 2, None))
    assert problem(gemma, "gemma2") is None
    expect(problem(gemma, "gemma"), "set export_config.decoder_type to one that fits it, which is gemma2")
    expect(problem(LLAMA_8B, "gemma2"), "computes other norms, caps or windows")
    third = replace(LLAMA_8B, gemma=GemmaAttention(256, None, None, 512, 6, 1e4), qk_norm=True)
    assert problem(third, "gemma3") is None
    expect(problem(replace(third, rotary_linear_factor=8.0), "gemma3"), "rope_scaling_factor=8.0")
    alone = replace(LLAMA_8B, qk_norm=True, num_query_groups=LLAMA_8B.num_attention_heads)
    expect(problem(alone, "qwen3"), "take the rows of queries and keys for others")
    expect(problem(replace(LLAMA_8B, qkv_bias=True)), "wants a bias on the query-key-value projection and the output")


def test_norm() -> None:
    assert norm_fits_decoder(LLAMA_8B, "llama", ("trtllm",)) is None
    assert norm_fits_decoder(STARCODER, "gpt", ("trtllm",)) is None
    expect(norm_fits_decoder(LLAMA_8B, "gpt", ("hf", "trtllm")), "decoder gpt only LayerNorm")
    assert norm_fits_decoder(LLAMA_8B, "gpt", ("hf",)) is None
    expect(norm_fits_decoder(replace(LLAMA_8B, normalization="LayerNorm"), "llama", ("trtllm",)), "llama only RMSNorm")
