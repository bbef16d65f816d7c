# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Llama of four million parameters, trained in about a minute on two cores."""

import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.muon import Muon

_SEQUENCE_LENGTH = 256
_BATCH_SIZE = 8
_STEPS = 300
_WARMUP_STEPS = 15
_MATRIX_LEARNING_RATE = 2e-2  # Muon's
_OTHER_LEARNING_RATE = 8e-3  # AdamW's: embeddings, norms, output layer
_REPORTS = 6
_SEED = 2026


def train_model(tokenizer: PreTrainedTokenizerFast, passages: Sequence[str]) -> LlamaForCausalLM:
    """Trains a model on the passages, in random order and each at most once, and prints its progress.

    Weights are float32. Where the processor has bfloat16 instructions the matrix products use them, at twice the speed.
    The same passages give the same model on the same machine.
    """
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM._from_config(_model_config(tokenizer), attn_implementation="eager")
    print(
        f"  {model.num_parameters():,} parameters, {_STEPS * _BATCH_SIZE * _SEQUENCE_LENGTH:,} tokens to see",
        flush=True,
    )
    shuffled = random.Random(_SEED).sample(passages, len(passages))
    batches = _batches(_rows(tokenizer, shuffled))
    optimizers = _optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_factor) for optimizer in optimizers]

    start, losses = time.monotonic(), []
    for step, tokens in enumerate(itertools.islice(batches, _STEPS), start=1):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16_instructions()):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
        losses.append(loss.item())
        if step % (_STEPS // _REPORTS) == 0:
            mean = sum(losses) / len(losses)
            seconds = time.monotonic() - start
            print(f"  step {step:4}  loss {mean:.2f}  perplexity {math.exp(mean):6.1f}  {seconds:4.0f} s", flush=True)
            losses.clear()
    return model.eval()


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, passages: Iterable[str]) -> float:
    """Per-token perplexity of the passages, in rows of 256 tokens."""
    rows = torch.stack(list(_rows(tokenizer, passages)))
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(16)]
    return math.exp(sum(losses) / len(rows))


def _model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Sizes that divide by 4 (tensor parallelism), and by 256 (AWQ's blocks of 128 at tensor parallelism 2)."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=_SEQUENCE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _optimizers(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of the layers, which learn from it in half the tokens, AdamW for the rest."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    ids = set(map(id, matrices))
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    adamw = torch.optim.AdamW(others, _OTHER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    return Muon(matrices, _MATRIX_LEARNING_RATE), adamw


def _rows(tokenizer: PreTrainedTokenizerFast, passages: Iterable[str]) -> Iterator[torch.Tensor]:
    """Yields the passages' tokens, each passage between BOS and EOS, in rows of (256,)."""
    row: list[int] = []
    for passage in passages:
        row += [*tokenizer(passage)["input_ids"], tokenizer.eos_token_id]
        while len(row) >= _SEQUENCE_LENGTH:
            yield torch.tensor(row[:_SEQUENCE_LENGTH])
            row = row[_SEQUENCE_LENGTH:]


def _batches(rows: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    while len(batch := list(itertools.islice(rows, _BATCH_SIZE))) == _BATCH_SIZE:
        yield torch.stack(batch)


def _learning_rate_factor(step: int) -> float:
    """Linear warm-up, then half a cosine."""
    return min((step + 1) / _WARMUP_STEPS, 0.5 * (1 + math.cos(math.pi * step / _STEPS)))


def _has_bfloat16_instructions() -> bool:
    """Without them, bfloat16 products are emulated, many times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
