# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The config.json that a model was published with, from a Hugging Face directory or a checkpoint imported from one.

NeMo's configuration has no place for much of it, such as the tokens that end a text. The import therefore keeps the
file in the checkpoint's context. NeMo does not copy it into the checkpoints that it trains.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.huggingface.hf_files import read_json
from nemo_ptq.checkpoint.metadata import is_hugging_face
from nemo_ptq.errors import PtqError
from nemo_ptq.models.hugging_face import HuggingFaceClass, Settings

KEPT = "hf_config.json"
"""Name of the file in a context."""

# Fields about how a process makes or holds a model, and not about the model itself.
_NOT_THE_MODEL = ("cp_comm_type", "make_vocab_size_divisible_by", "vocab_size")


def keep_config(source: Path, context: Path) -> None:
    """Copies the config.json of a Hugging Face directory into a context."""
    shutil.copyfile(source / "config.json", context / KEPT)


def published_config(checkpoint: Path, hf_class: HuggingFaceClass, nemo: Any) -> dict[str, Any] | None:
    """Returns the config.json that a model was published with.

    Args:
        checkpoint: A Hugging Face directory, or a NeMo checkpoint.
        hf_class: The model's class.
        nemo: The model's NeMo configuration, as attributes.

    Returns:
        None where it is not known, or describes another model than NeMo's configuration does.

    Raises:
        PtqError: If it cannot be read.
    """
    if is_hugging_face(checkpoint):
        return read_json(checkpoint / "config.json")
    kept = checkpoint / "context" / KEPT
    if not os.path.lexists(kept):
        return None
    content = read_json(kept)
    return content if _is_of(hf_class, content, nemo) else None


def _is_of(hf_class: HuggingFaceClass, content: Settings, nemo: Any) -> bool:
    if content.get("architectures") != [hf_class.architecture]:
        return False
    try:
        _, common, special = hf_class.nemo_arguments(hf_class.read(content))
    except PtqError:
        return False
    expected = {name: value for name, value in {**common, **special}.items() if name not in _NOT_THE_MODEL}
    return all(_plain(getattr(nemo, name, None)) == _plain(value) for name, value in expected.items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
