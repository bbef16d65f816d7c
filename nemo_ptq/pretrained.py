# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""transformers' tokenizers, loaded without most of transformers."""

from pathlib import Path
from typing import Any

from nemo_ptq.untrusted import FileError, read_json


def load_pretrained(directory: Path, use_fast: bool = True) -> Any:
    """Loads transformers' tokenizer as AutoTokenizer does, offline and without code of the directory's.

    AutoTokenizer imports what it knows of all models, which takes several seconds. Where the directory names a fast
    class of transformers' own, that class is loaded at once.

    Args:
        directory: The tokenizer's files.
        use_fast: Whether a fast class is taken where the directory names the slow one.

    Raises:
        Exception: Whatever transformers raises of files that are missing or damaged.
    """
    import transformers

    name = _named_class(directory)
    fast = name if name is None or name.endswith("Fast") or not use_fast else f"{name}Fast"
    if fast is not None and fast.endswith("Fast") and (directory / "tokenizer.json").is_file():
        tokenizer_class = getattr(transformers, fast, None)
        if isinstance(tokenizer_class, type) and issubclass(tokenizer_class, transformers.PreTrainedTokenizerFast):
            return tokenizer_class.from_pretrained(directory, local_files_only=True)
    return transformers.AutoTokenizer.from_pretrained(
        directory, use_fast=use_fast, local_files_only=True, trust_remote_code=False
    )


def _named_class(directory: Path) -> str | None:
    """The class that tokenizer_config.json names; None where there is none, or code beside it decides."""
    try:
        settings = read_json(directory / "tokenizer_config.json", finite=False)
    except FileError:
        return None
    if not isinstance(settings, dict) or "auto_map" in settings:
        return None
    name = settings.get("tokenizer_class")
    return name if isinstance(name, str) else None
