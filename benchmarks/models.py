# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, built where they run: what is measured needs their shapes, not their knowledge."""

from collections.abc import Mapping
from typing import Any

import torch

from nemo_ptq.checkpoint.gpt import ACTIVATION_FUNCTIONS, build_gpt, make_config, settings_for_calibration
from nemo_ptq.models.llama import LLAMA
from nemo_ptq.parallel.megatron import GPTModel

_LLAMA3_8B: Mapping[str, Any] = {
    **LLAMA.nemo_fixed,
    "activation_func": ACTIVATION_FUNCTIONS["silu"],
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 500_000,
    "seq_length": 8192,
    "share_embeddings_and_output_weights": False,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama3-8b": {"vocab_size": 128256},
    "llama-77m": {
        "vocab_size": 10240,
        "num_layers": 4,
        "hidden_size": 1024,
        "ffn_hidden_size": 3584,
        "num_attention_heads": 16,
        "seq_length": 2048,
    },
}
"""By name: how a model differs from Llama 3 8B."""

_SEED = 1234
_WEIGHT_STD = 0.02


def build(name: str, device: torch.device, num_layers: int | None = None) -> tuple[GPTModel, Any]:
    """Builds a model with seeded, normally distributed weights, and gains of one.

    Runs inside :func:`nemo_ptq.parallel.process_groups.process_groups`.

    Args:
        name: One of :data:`MODELS`.
        device: Where to.
        num_layers: Layers to build; None builds all.

    Returns:
        Megatron's model in bfloat16, and its config.
    """
    layers = {} if num_layers is None else {"num_layers": num_layers}
    settings = settings_for_calibration(_LLAMA3_8B, device, torch.bfloat16, {**MODELS[name], **layers})
    config = make_config({**_LLAMA3_8B, **settings})
    module = build_gpt(config, LLAMA.nemo_model).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(_SEED)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, _WEIGHT_STD, generator=generator)
    return module, config


def random_tokens(vocab_size: int, samples: int, length: int, batch_size: int) -> list[torch.Tensor]:
    """Returns seeded batches of tokens: int64 (at most batch_size, length) each."""
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(vocab_size, (samples, length), generator=generator)
    return list(tokens.split(batch_size))
