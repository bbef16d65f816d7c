# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Texts for an evaluation, tokenized with the tokenizer that lies in the exported directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from nemo_ptq.calibration.chats import Sample
from nemo_ptq.calibration.datasets import read_samples, split_samples
from nemo_ptq.calibration.text_files import read_text_file
from nemo_ptq.calibration.tokens import tokenize_all
from nemo_ptq.errors import PtqError
from nemo_ptq.pretrained import load_pretrained
from nemo_ptq.untrusted import check_regular
from nemo_ptq.verify.context import read_model_yaml, tokenizer_path
from nemo_ptq.verify.huggingface.hf_directory import is_hugging_face
from nemo_ptq.verify.manifest import MANIFEST
from nemo_ptq.verify.model_config import load_json
from nemo_ptq.verify.nemo.megatron_model import is_megatron, tokenizer_of


@dataclass(frozen=True)
class Documents:
    """Tokenized texts.

    Attributes:
        tokens: int64 (1, length) each, of two tokens or more.
        source: The data set or file that they come from.
        held_out: Whether the job did not calibrate on them; None if unknown.
        decode: Makes text of token ids.
    """

    tokens: Sequence[torch.Tensor]
    source: str
    held_out: bool | None
    decode: Callable[[list[int]], str]


def load_tokenizer(directory: Path) -> Any:
    """Loads a directory's tokenizer without NeMo, offline and without remote code.

    Returns:
        An object of the form that :func:`nemo_ptq.calibration.tokens.tokenize` takes, with ``decode``.

    Raises:
        PtqError: If its files are missing or damaged.
    """
    path = _tokenizer_of(directory)
    try:
        return _load_tokenizer(path)
    except Exception as error:  # every tokenizer class raises its own kinds
        reason = str(error).partition("\n")[0]
        raise PtqError(f"{path} has no tokenizer that can be loaded ({reason}): copy or export it again") from error


def _tokenizer_of(directory: Path) -> Path:
    if is_hugging_face(directory):
        return directory
    if is_megatron(directory):
        if (found := tokenizer_of(directory)) is None:
            raise PtqError(f"{directory} has no tokenizer/ beside its weights: copy that of the model there")
        return found
    return tokenizer_path(directory, read_model_yaml(directory))


def _load_tokenizer(path: Path) -> Any:
    if path.is_dir():
        inner = load_pretrained(path)
        return SimpleNamespace(tokenizer=inner, decode=inner.decode)
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(check_regular(path)))
    return SimpleNamespace(bos_id=processor.bos_id(), text_to_ids=processor.encode, decode=processor.decode)


def load_documents(directory: Path, text: Path | None, seq_len: int, count: int) -> Documents:
    """Tokenizes the first documents of a text file, or of the calibration data set, each cut at ``seq_len`` tokens.

    Args:
        directory: The exported directory, in any format.
        text: A .jsonl, .json, .txt or .parquet file, as for calibration. None takes the data set that the directory's
            manifest names: the samples after those calibrated on, or those if there are no others.
        seq_len: The most tokens of a document.
        count: The most documents.

    Raises:
        PtqError: If no document has two tokens, or there is no text.
    """
    tokenizer = load_tokenizer(directory)
    source, samples, held_out = _calibration_samples(directory, count) if text is None else _file_samples(text, count)
    found = tokenize_all(tokenizer, samples, seq_len, source)
    tokens = [torch.tensor([sequence], dtype=torch.int64) for sequence in found]
    tokens = [document for document in tokens if document.shape[1] > 1]
    if not tokens:
        raise PtqError(f"{source} holds no document of two tokens or more: there is nothing to predict")
    return Documents(tokens, source, held_out, tokenizer.decode)


def _file_samples(text: Path, count: int) -> tuple[str, list[Sample], bool | None]:
    return str(text), list(islice(read_text_file(str(text)), count)), None


def _calibration_samples(directory: Path, count: int) -> tuple[str, list[Sample], bool | None]:
    try:
        arguments = load_json(directory / MANIFEST)["arguments"]
        dataset, used = (arguments["quantization_config"][f"calibration_dataset{end}"] for end in ("", "_size"))
        if not isinstance(dataset, str) or not isinstance(used, int):
            raise PtqError("its manifest names no data set")
        if arguments.get("forward_loop") is not None:
            raise PtqError("the calibration loop was the user's own")
        calibrated, others = split_samples(dataset, read_samples(dataset, used + count), used)
    except (PtqError, KeyError, TypeError, ValueError) as error:
        raise PtqError(f"name documents with --text: {directory} does not lead to any ({error})") from error
    return dataset, list(others or calibrated)[:count], bool(others)
