# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration data: texts from a file or a hub data set -> tokens -> batches without padding."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from nemo_ptq.calibration.text_files import Sample, read_text_file
from nemo_ptq.config import is_text_file
from nemo_ptq.errors import PtqError


def _wikitext() -> Iterator[Sample]:
    from datasets import load_dataset

    return (row["text"] for row in load_dataset("wikitext", "wikitext-103-v1", split="train") if row["text"].strip())


def _cnn_dailymail() -> Iterator[Sample]:
    from datasets import load_dataset

    return (row["article"] for row in load_dataset("cnn_dailymail", "3.0.0", split="train"))


# A data set is one function; its name here is what calibration_dataset takes. config.DATASETS lists the same names.
HUB_DATASETS = {"wikitext": _wikitext, "cnn_dailymail": _cnn_dailymail}


def read_samples(dataset: str, size: int) -> list[Sample]:
    """Returns the first ``size`` samples of a data set, or as many as it has.

    Args:
        dataset: A local .jsonl, .json or .txt file, or "wikitext" or "cnn_dailymail", which the ``datasets`` library
            fetches or finds in its cache (``HF_DATASETS_OFFLINE`` and ``HF_HUB_OFFLINE`` are honoured).
        size: Samples wanted.

    Raises:
        PtqError: If the file cannot be read, or the hub data set is not to be had.
    """
    if is_text_file(dataset):
        return list(islice(read_text_file(dataset), size))
    try:
        return list(islice(HUB_DATASETS[dataset](), size))
    except (OSError, ValueError, RuntimeError) as error:
        raise PtqError(
            f"calibration_dataset={dataset!r} could not be loaded ({type(error).__name__}: {error}); "
            "give a local .jsonl, .json or .txt file instead, or fill the datasets cache on a machine with a network"
        ) from error


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
