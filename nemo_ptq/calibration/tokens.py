# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Samples -> tokens -> batches without padding."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nemo_ptq.calibration.text_files import Sample
from nemo_ptq.errors import PtqError


def tokenize(tokenizer: Any, sample: Sample, seq_len: int) -> list[int]:
    """Returns the first ``seq_len`` token ids of a text or a chat, special tokens as a server would put them.

    The beginning-of-sequence token matters: in Llama-like models its activations are the largest of all.

    Args:
        tokenizer: NeMo's tokenizer, around a Hugging Face or a SentencePiece one.
        sample: A text, or a list of chat messages with ``role`` and ``content``.
        seq_len: Tokens to keep.

    Raises:
        PtqError: If the sample is a chat and the tokenizer has no chat template.
    """
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if isinstance(sample, str):
        if callable(inner) and hasattr(inner, "apply_chat_template"):
            return list(inner(sample, verbose=False)["input_ids"][:seq_len])
        bos = [tokenizer.bos_id] if getattr(tokenizer, "bos_id", -1) not in (None, -1) else []
        return (bos + list(tokenizer.text_to_ids(sample)))[:seq_len]
    if not getattr(inner, "chat_template", None):
        raise PtqError(
            "the calibration data holds chat messages but the tokenizer has no chat template; "
            "give texts instead, or tokenizer_path= with a tokenizer that has one"
        )
    return list(inner.apply_chat_template(sample, tokenize=True, return_dict=False)[:seq_len])


def share(samples: Sequence[Any], rank: int, ranks: int) -> Sequence[Any]:
    """Returns the samples that one of ``ranks`` data-parallel ranks reads: every ``ranks``-th, and at least one.

    Example:
        >>> share("abcde", 1, 2)
        'bd'
    """
    return samples[rank % len(samples) :: ranks]


def make_batches(sequences: Iterable[Sequence[int]], batch_size: int) -> list[torch.Tensor]:
    """Batches sequences of equal length together, so that no position is padding.

    A pad position would enter every statistic like a real one. With texts longer than the cut, the usual case, all
    sequences have one length and the batches are full.

    Args:
        sequences: Token ids; empty ones are dropped.
        batch_size: The most sequences in one batch.

    Returns:
        int64 tensors of shape (at most batch_size, length), in the order in which each was first begun.
    """
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for sequence in sequences:
        if sequence:
            by_length[len(sequence)].append(sequence)
    return [
        torch.tensor(group[start : start + batch_size], dtype=torch.int64)
        for group in by_length.values()
        for start in range(0, len(group), batch_size)
    ]
