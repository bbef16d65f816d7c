# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The sizes of well-known models, for plans without a checkpoint."""

from dataclasses import replace

from nemo_ptq.models.spec import ModelSpec

LLAMA_8B = ModelSpec(
    model_class="nemo.collections.llm.gpt.model.llama.LlamaModel",
    config_class="nemo.collections.llm.gpt.model.llama.Llama3Config8B",
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    head_size=128,
    ffn_hidden_size=14336,
    gated_mlp=True,
    vocab_size=128256,
    num_experts=None,
    seq_length=8192,
    position_embedding_type="rope",
    normalization="RMSNorm",
    tied_embeddings=False,
    activation="silu",
)
LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, num_attention_heads=64, ffn_hidden_size=28672)
MIXTRAL = replace(LLAMA_8B, config_class="MixtralConfig8x7B", vocab_size=32000, num_experts=8, experts_per_token=2)
NEMOTRON_340B = replace(
    LLAMA_8B,
    config_class="Nemotron4Config340B",
    num_layers=96,
    hidden_size=18432,
    num_attention_heads=96,
    head_size=192,
    ffn_hidden_size=73728,
    gated_mlp=False,
    activation="squared-relu",
    vocab_size=256000,
    normalization="LayerNorm",
)
