# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as transformers 4 or 5 has saved them, loaded without most of transformers."""

import re
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_ptq.stand_ins import stand_ins
from nemo_ptq.untrusted import FileError, read_json

# What transformers 5 calls the class that it had called PreTrainedTokenizerFast before.
OF_TRANSFORMERS_5 = "TokenizersBackend"
TOKENS_WITHOUT_ROWS = frozenset({"<image_soft_token>"})
"""Tokens that published models have no row for: Gemma 3 1B and smaller have the tokenizer of those that see images."""


def import_transformers() -> Any:
    """Returns transformers, imported without distributed tensors, which version 4 loads for a debugging aid alone."""
    is_first = "transformers" not in sys.modules
    with stand_ins({"torch.distributed.tensor": {}} if is_first and version("transformers").startswith("4.") else {}):
        import transformers

    return transformers


def load_pretrained(directory: Path, use_fast: bool = True) -> Any:
    """Loads transformers' tokenizer as AutoTokenizer does, offline and without code of the directory's.

    AutoTokenizer imports what it knows of all models, which takes several seconds. Where the directory names a fast
    class of transformers' own, that class is loaded at once.

    Args:
        directory: The tokenizer's files.
        use_fast: Whether to load the fast class if the directory names the slow one.

    Raises:
        Exception: Whatever transformers raises for files that are missing or damaged.
    """
    transformers = import_transformers()
    settings = tokenizer_settings(directory)
    further: dict[str, Any] = {"local_files_only": True}
    if isinstance(extra := settings.get("extra_special_tokens"), list):  # an object in transformers 4
        further |= {"extra_special_tokens": {}, "additional_special_tokens": extra}
    named = settings.get("tokenizer_class")
    name = named if isinstance(named, str) and "auto_map" not in settings else None
    if name == OF_TRANSFORMERS_5:
        return transformers.PreTrainedTokenizerFast.from_pretrained(directory, **further)
    fast = name if name is None or name.endswith("Fast") or not use_fast else f"{name}Fast"
    if fast is not None and fast.endswith("Fast") and (directory / "tokenizer.json").is_file():
        tokenizer_class = getattr(transformers, fast, None)
        if isinstance(tokenizer_class, type) and issubclass(tokenizer_class, transformers.PreTrainedTokenizerFast):
            return getattr(transformers, fast).from_pretrained(directory, **further)
    found = transformers.AutoTokenizer.from_pretrained(directory, use_fast=use_fast, trust_remote_code=False, **further)
    if not isinstance(found, transformers.PreTrainedTokenizerBase):  # transformers makes other things of base classes
        raise ValueError(f"tokenizer_class {name} is no tokenizer")
    return found


def is_tokenizer_class(name: str) -> bool:
    """Whether transformers has a tokenizer class of this name, or a fast one for it; nothing is imported.

    True where transformers is not installed, so that it is not known.
    """
    if name in (OF_TRANSFORMERS_5, "PreTrainedTokenizer", "PreTrainedTokenizerFast"):
        return True
    known = _tokenizer_classes()
    return not known or name in known or f"{name}Fast" in known


@cache
def _tokenizer_classes() -> frozenset[str]:
    """The names that AutoTokenizer's module lists."""
    package = find_spec("transformers")
    if package is None or package.origin is None:
        return frozenset()
    module = Path(package.origin).parent / "models" / "auto" / "tokenization_auto.py"
    return frozenset(re.findall(r'"(\w+Tokenizer(?:Fast)?)"', module.read_text(encoding="utf-8")))


def tokenizer_settings(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty if it cannot be read."""
    try:
        settings = read_json(directory / "tokenizer_config.json", finite=False)
    except FileError:
        return {}
    return settings if isinstance(settings, dict) else {}
