# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer interface of a job, without NeMo's classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemo_ptq.errors import PtqError


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer interface of a job, which NeMo's own classes have as well.

    Attributes:
        tokenizer: transformers'.
    """

    tokenizer: Any

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Returns the tokens of ids; None for an id that the tokenizer does not have."""
        return list(self.tokenizer.convert_ids_to_tokens(ids))

    def ids_to_text(self, ids: Sequence[int]) -> str:
        """Makes text of token ids, special tokens left out."""
        tokens = self.ids_to_tokens(ids)
        special = set(self.tokenizer.all_special_tokens)
        return self.tokenizer.convert_tokens_to_string([token for token in tokens if token not in special])


def transformers_tokenizer(tokenizer: Any) -> Any:
    """Returns the transformers tokenizer inside a job's, which can be saved as a directory.

    Raises:
        PtqError: If there is none in it.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "save_pretrained"):
        raise PtqError(
            f"{type(tokenizer).__name__} cannot be saved as a Hugging Face tokenizer: give tokenizer_path= a "
            "Hugging Face directory that holds the same tokenizer"
        )
    return inner


def with_nemos_special_tokens(tokenizer: Any) -> Any:
    """Gives a tokenizer the special tokens that NeMo's class of it has; returns the same tokenizer."""
    special: dict[str, Any] = {"additional_special_tokens": []}
    for one, other in (("sep_token", "eos_token"), ("cls_token", "bos_token")):
        # In NeMo each stands in for the other.
        mine, theirs = getattr(tokenizer, one), getattr(tokenizer, other)
        if mine is None and theirs:
            special[one] = theirs
        if theirs is None and mine:
            special[other] = mine
    tokenizer.add_special_tokens(special)
    return tokenizer
