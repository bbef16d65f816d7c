# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Samples -> tokens -> batches without padding."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch

from nemo_ptq.calibration.chats import Chat, Message, Sample, plain_text, with_system_in_first_turn
from nemo_ptq.errors import PtqError
from nemo_ptq.limits import limited

# Characters that are tokenized for each token wanted, and how many more tokens than wanted must result: that far before
# the cut, the tokens are those of the whole text.
_CHARACTERS, _MARGIN = 16, 64
# Limits of a chat template for one chat; templates of published models take milliseconds.
_TEMPLATE_SECONDS, _TEMPLATE_BYTES = 10, 1 << 30
Encode = Callable[[str], Sequence[int]]


def tokenize(tokenizer: Any, sample: Sample, seq_len: int) -> list[int]:
    """Returns the first ``seq_len`` token ids of a text or a chat, special tokens as a server would put them.

    The beginning-of-sequence token matters: in Llama-like models its activations are the largest of all.

    Args:
        tokenizer: NeMo's tokenizer, around a Hugging Face or a SentencePiece one.
        sample: A text, or a chat.
        seq_len: Tokens to keep.

    Raises:
        PtqError: If the sample is a chat and the tokenizer has no chat template, or one that refuses it.
    """
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if not isinstance(sample, str):
        chat = sample if isinstance(sample, Chat) else Chat(sample)
        if getattr(inner, "chat_template", None):
            rendered = _rendered(inner, chat) if chat.messages else ""
            return first_tokens(lambda text: inner(text, add_special_tokens=False)["input_ids"], rendered, seq_len)
        if not chat.may_be_plain:
            raise PtqError(
                "the calibration data holds chat messages but the tokenizer has no chat template; "
                "give texts instead, or tokenizer_path= with a tokenizer that has one"
            )
        sample = plain_text(chat.messages)
    if callable(inner) and hasattr(inner, "apply_chat_template"):
        return first_tokens(lambda text: inner(text, verbose=False)["input_ids"], sample, seq_len)
    bos = [tokenizer.bos_id] if getattr(tokenizer, "bos_id", -1) not in (None, -1) else []
    return (bos + first_tokens(tokenizer.text_to_ids, sample, seq_len))[:seq_len]


def tokenize_all(tokenizer: Any, samples: Iterable[Sample], seq_len: int, dataset: str) -> list[list[int]]:
    """Returns the first ``seq_len`` token ids of each sample, see :func:`tokenize`.

    Raises:
        PtqError: If a sample cannot be tokenized; says which one of the data set.
    """
    sequences = []
    for number, sample in enumerate(samples, start=1):
        try:
            sequences.append(tokenize(tokenizer, sample, seq_len))
        except PtqError as error:
            raise PtqError(f"sample {number} of calibration_dataset={dataset}: {error}") from error
    return sequences


def first_tokens(encode: Encode, text: str, seq_len: int) -> list[int]:
    """Returns the first ``seq_len`` tokens of a text, however long it is, without tokenizing much more of it.

    Args:
        encode: Makes token ids of a text.
        text: The text.
        seq_len: Tokens to keep.
    """
    length = _CHARACTERS * (seq_len + _MARGIN)
    while length < len(text):
        cut = text[:length]
        tokens = encode(cut.rsplit(None, 1)[0] if cut.strip() else cut)
        if len(tokens) >= seq_len + _MARGIN:
            return list(tokens[:seq_len])
        length *= 4
    return list(encode(text)[:seq_len])


def _rendered(inner: Any, chat: Chat) -> str:
    """Writes a chat with the tokenizer's template; one without a system role gets the system's text in the first turn.

    Raises:
        PtqError: If the template refuses the chat.
    """

    def apply(messages: Sequence[Message]) -> str:
        # A template is a program of the checkpoint's, in a sandbox without limits.
        with limited(_TEMPLATE_SECONDS, _TEMPLATE_BYTES):
            return inner.apply_chat_template(list(messages), tools=chat.tools, tokenize=False)

    roles = ", ".join(str(message.get("role")) for message in chat.messages)
    try:
        return apply(chat.messages)
    except (TimeoutError, MemoryError) as error:
        raise PtqError(
            f"the tokenizer's chat template takes more than {_TEMPLATE_SECONDS} s or {_TEMPLATE_BYTES >> 30} GiB for a "
            f"chat of {roles}: give texts instead, or tokenizer_path= with a tokenizer that you trust"
        ) from error
    # Templates raise errors of their own, and fail at what they do not expect.
    except Exception as error:
        merged = with_system_in_first_turn(chat.messages)
        if merged is not None:
            with suppress(Exception):
                return apply(merged)
        reason = " ".join(str(error).split())
        raise PtqError(
            f"the tokenizer's chat template refuses a chat of {roles} ({reason}): take it out of the data, give it the "
            "turns that the template wants, or give texts instead"
        ) from error


def check_in_vocabulary(sequences: Iterable[Sequence[int]], vocab_size: int, dataset: str) -> None:
    """Refuses tokens that the model has no row for.

    Raises:
        PtqError: If there is one.
    """
    largest = max((max(sequence) for sequence in sequences if sequence), default=0)
    if largest >= vocab_size:
        raise PtqError(
            f"the tokenizer gives token {largest} for calibration_dataset={dataset}, and the model's embedding has "
            f"only {vocab_size} rows: give tokenizer_path= with the model's own tokenizer"
        )


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
