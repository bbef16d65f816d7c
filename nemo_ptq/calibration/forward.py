# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A forward pass of a Megatron model across pipeline stages, without a schedule for training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.parallel.megatron import GPTModel, parallel_state, tensor_parallel


def _positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


@contextmanager
def _without_output_layer(module: GPTModel) -> Iterator[None]:
    """Has a last stage return its hidden states: its output layer is wide, and is not calibrated."""
    is_last, module.post_process = module.post_process, False
    try:
        yield
    finally:
        module.post_process = is_last


def _calibrates_output_layer(module: GPTModel) -> bool:
    quantizer = getattr(getattr(module, "output_layer", None), "input_quantizer", None)
    return quantizer is not None and quantizer.is_enabled


def run_batches(module: GPTModel, batches: Iterable[torch.Tensor]) -> Iterator[None]:
    """Runs batches as :func:`forward_batches` does, for the statistics alone: no logits are computed."""
    with nullcontext() if _calibrates_output_layer(module) else _without_output_layer(module):
        for _ in forward_batches(module, batches):
            yield None


@torch.no_grad()
def forward_batches(module: GPTModel, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | None]:
    """Runs batches through all pipeline stages, one after the other on each stage and overlapping between stages.

    Every rank of a pipeline iterates over the same batches. A stage hands its hidden states on without waiting, so
    that it works on the next batch while the following stage works on this one.

    Args:
        module: This rank's stage.
        batches: int64 tokens of shape (batch, sequence), all of one length within a batch: there is no padding.

    Yields:
        For each batch: on the last stage this tensor-parallel rank's logits, (batch, sequence, padded vocabulary / TP);
        on the other stages None.
    """
    device = next(module.parameters()).device
    hidden_size, dtype = module.config.hidden_size, module.config.params_dtype
    sending: tuple[Any, torch.Tensor] | None = None
    for tokens in batches:
        tokens = tokens.to(device)
        if not module.pre_process:
            hidden = torch.empty(tokens.shape[1], tokens.shape[0], hidden_size, dtype=dtype, device=device)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            module.set_input_tensor(hidden)
        output = module(tokens, _positions(tokens), None)
        if parallel_state.is_pipeline_last_stage():
            yield output
            continue
        if sending is not None:
            sending[0].wait()
        output = output.contiguous()
        # The tensor must outlive the transfer.
        sending = (dist.isend(output, parallel_state.get_pipeline_model_parallel_next_rank()), output)
        yield None
    if sending is not None:
        sending[0].wait()


def whole_logits(model: LoadedModel, logits: torch.Tensor) -> torch.Tensor:
    """float32 (batch, sequence, vocabulary), from one tensor-parallel rank's share."""
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[..., : model.vocab_size].float()
