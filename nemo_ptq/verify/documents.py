# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Texts for an evaluation, tokenized with the tokenizer that lies in the exported directory."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_ptq.calibration.data import tokenize
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.errors import PtqError
from nemo_ptq.verify.context import read_model_yaml, tokenizer_path


def load_tokenizer(directory: Path) -> Any:
    """Loads a directory's tokenizer without NeMo, offline and without remote code.

    Returns:
        An object of the form that :func:`nemo_ptq.calibration.data.tokenize` takes.
    """
    path = tokenizer_path(directory, read_model_yaml(directory))
    if path.is_dir():
        from transformers import AutoTokenizer

        inner = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return SimpleNamespace(tokenizer=inner)
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    return SimpleNamespace(bos_id=processor.bos_id(), text_to_ids=processor.encode)


def load_documents(directory: Path, text: Path, seq_len: int, count: int) -> list[torch.Tensor]:
    """Tokenizes the first documents of a text file, each cut at ``seq_len`` tokens.

    Args:
        directory: The qnemo directory.
        text: A .jsonl, .json or .txt file, as for calibration.
        seq_len: The most tokens of a document.
        count: The most documents.

    Returns:
        int64 (1, length) each, of two tokens or more.

    Raises:
        PtqError: If no document has two tokens.
    """
    tokenizer = load_tokenizer(directory)
    samples = islice(read_text_file(str(text)), count)
    documents = [torch.tensor([tokenize(tokenizer, sample, seq_len)], dtype=torch.int64) for sample in samples]
    documents = [document for document in documents if document.shape[1] > 1]
    if not documents:
        raise PtqError(f"{text} holds no document of two tokens or more: there is nothing to predict")
    return documents
