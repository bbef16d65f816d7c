# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The small files beside the weights, which exports copy, and readers take for missing where they are damaged."""

import os
from pathlib import Path

from nemo_ptq.checkpoint.generation import check_generation
from nemo_ptq.untrusted import FileError, check_regular, read_json

_GENERATION = "generation_config.json"
_DOCUMENTS = (
    "added_tokens.json",
    "chat_template.jinja",
    _GENERATION,
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def check_small_files(directory: Path) -> None:
    """Refuses a damaged generation configuration, or a damaged part of the tokenizer.

    Args:
        directory: A Hugging Face directory, or one with the tokenizer of a NeMo checkpoint.

    Raises:
        FileError: If one that is there is no regular file, or does not hold a JSON object where its name promises one.
        PtqError: If the generation has settings that transformers refuses.
    """
    for name in _DOCUMENTS:
        if os.path.lexists(file := directory / name):
            check_regular(file)
            if file.suffix != ".json":
                continue
            content = read_json(file, finite=name == _GENERATION)  # whose numbers go into the exports
            if not isinstance(content, dict):
                raise FileError(file, f"holds a {type(content).__name__}, expected a JSON object")
            if name == _GENERATION:
                check_generation(content)
