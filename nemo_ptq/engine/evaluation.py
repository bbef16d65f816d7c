# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Perplexity and samples of text of a Megatron model, across tensor and pipeline parallelism."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_ptq.calibration.forward import forward_batches, whole_logits
from nemo_ptq.calibration.tokens import tokenize
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.parallel.megatron import parallel_state

_SAMPLE_PROMPT = "Born in north-east France, Soyer trained as a"


def _from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Sends values that the last stage has computed to all stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


@torch.no_grad()
def perplexity(model: LoadedModel, batches: Iterable[torch.Tensor]) -> float:
    """Returns exp of the mean negative log-likelihood of each token given those before it.

    Args:
        model: A model, with quantizers or without.
        batches: int64 (batch, sequence) each, without padding; every rank of the model gives the same.
    """
    device = next(model.module.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    batches = list(batches)
    for tokens, logits in zip(batches, forward_batches(model.module, batches), strict=True):
        if logits is not None:
            predicted = whole_logits(model, logits)[:, :-1].flatten(0, 1)
            wanted = tokens[:, 1:].flatten().to(device)
            total += torch.stack(
                [
                    F.cross_entropy(predicted, wanted, reduction="sum").double(),
                    torch.tensor(wanted.numel(), device=device),
                ]
            )
    loss, count = _from_last_stage(total).tolist()
    return math.exp(loss / count)


@torch.no_grad()
def generate(model: LoadedModel, prompt: Sequence[int], count: int = 30) -> list[int]:
    """Continues a prompt greedily; every rank of the model calls it and gets the same tokens.

    Args:
        model: A model, with quantizers or without.
        prompt: Token ids.
        count: Number of tokens to add.
    """
    device = next(model.module.parameters()).device
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    for _ in range(count):
        (logits,) = forward_batches(model.module, [tokens])
        following = torch.zeros(1, dtype=torch.int64, device=device)
        if logits is not None:
            following = whole_logits(model, logits)[0, -1].argmax().reshape(1)
        tokens = torch.cat([tokens, _from_last_stage(following).reshape(1, 1)], dim=1)
    return tokens[0].tolist()


def sample(model: LoadedModel) -> str:
    """Returns how a model continues a sentence; every rank of the model calls it."""
    return text_of(model.tokenizer, generate(model, tokenize(model.tokenizer, _SAMPLE_PROMPT, 64)))


def text_of(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Returns the text of tokens, without tokens that have none, such as the padding rows of an embedding.

    Args:
        tokenizer: NeMo's tokenizer.
        tokens: Token ids.
    """
    return tokenizer.ids_to_text([token for token in tokens if _has_text(tokenizer, token)])


def _has_text(tokenizer: Any, token: int) -> bool:
    try:
        return tokenizer.ids_to_tokens([token])[0] is not None
    except (IndexError, KeyError):  # of libraries that look it up
        return False
