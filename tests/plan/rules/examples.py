# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models for the rules to look at, and what they should say."""

from dataclasses import replace

from tests.plan.models import LLAMA_8B

LLAMA_2_7B = replace(LLAMA_8B, num_query_groups=32, ffn_hidden_size=11008)
MIXTRAL = replace(LLAMA_8B, config_class="x.MixtralConfig8x7B", num_experts=8)
STARCODER = replace(
    LLAMA_8B, config_class="x.StarcoderConfig15B", num_query_groups=1, normalization="LayerNorm",
    position_embedding_type="learned_absolute",
)  # fmt: skip


def expect(problem: str | None, message: str | None) -> None:
    if message is None:
        assert problem is None
    else:
        assert problem is not None
        assert message in problem
