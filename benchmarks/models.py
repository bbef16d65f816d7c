# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, built where they run: what is measured needs their shapes, not their knowledge."""

from collections.abc import Mapping
from typing import Any

import fiddle as fdl
import torch
from megatron.core.models.gpt import GPTModel
from nemo.collections import llm

from nemo_ptq.checkpoint.loading import build_model

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
"""By name: how a model differs from NeMo's Llama3Config8B."""

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
        Megatron's model in bfloat16, and the NeMo config that built it.
    """
    context = fdl.Config(llm.LlamaModel, config=fdl.Config(llm.Llama3Config8B))
    layers = {} if num_layers is None else {"num_layers": num_layers}
    model = build_model(context, device, {**MODELS[name], **layers})
    generator = torch.Generator(device).manual_seed(_SEED)
    for parameter in model.module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, _WEIGHT_STD, generator=generator)
    return model.module, model.config


def random_tokens(vocab_size: int, samples: int, length: int, batch_size: int) -> list[torch.Tensor]:
    """Returns seeded batches of tokens: int64 (at most batch_size, length) each."""
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(vocab_size, (samples, length), generator=generator)
    return list(tokens.split(batch_size))
