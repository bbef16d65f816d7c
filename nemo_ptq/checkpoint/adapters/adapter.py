# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The adapter that a user names beside a checkpoint, of any kind. Needs no torch."""

from pathlib import Path

from nemo_ptq.checkpoint.adapters import nemo_adapter, peft_adapter
from nemo_ptq.checkpoint.adapters.nemo_adapter import NemoAdapter, is_nemo_adapter, read_nemo_adapter
from nemo_ptq.checkpoint.adapters.peft_adapter import PeftAdapter, is_peft, read_peft_adapter
from nemo_ptq.checkpoint.huggingface.description import describe
from nemo_ptq.checkpoint.huggingface.hf_files import found_in
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec

Adapter = NemoAdapter | PeftAdapter


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter's description, and none of its matrices.

    Args:
        path: A checkpoint of NeMo's LoRA, or a directory of PEFT's.

    Raises:
        PtqError: If it is neither, cannot be merged, or is damaged.
    """
    if is_peft(path):
        return read_peft_adapter(path)
    if (path / "context").is_dir() and (path / "weights").is_dir():
        return read_nemo_adapter(path)
    if not path.exists():
        raise PtqError(f"adapter={path} does not exist: give the directory of a LoRA adapter")
    raise PtqError(
        f"adapter={path} is neither a LoRA checkpoint of NeMo's (context/ and weights/) nor an adapter of PEFT's "
        f"({peft_adapter.CONFIG}); {found_in(path)}"
    )


def check_adapter(path: Path, checkpoint: Path, model: ModelSpec, is_hugging_face: bool) -> None:
    """Checks whether an adapter can be merged into a checkpoint.

    Args:
        path: The adapter.
        checkpoint: The model that it is to be merged into.
        model: The model, from its files.
        is_hugging_face: Whether it is a Hugging Face directory.

    Raises:
        PtqError: If it cannot.
    """
    adapter = read_adapter(path)
    if model.is_quantized:
        raise PtqError(
            f"adapter={path} cannot be merged into {checkpoint}, which holds quantizers: give the model before"
        )
    if isinstance(adapter, NemoAdapter):
        adapter.check(model)
        return
    if not is_hugging_face:
        raise PtqError(
            f"adapter={path} is PEFT's, which is merged into a Hugging Face directory, and {checkpoint} is none: give "
            "the Hugging Face model that it was trained on"
        )
    adapter.check(describe(checkpoint))


def way_out(path: Path) -> str | None:
    """The message for an adapter that is given in place of a model; None for other directories."""
    if is_peft(path):
        base = peft_adapter.base_of(path)
    elif is_nemo_adapter(path):
        base = nemo_adapter.model_of(path)
    else:
        return None
    return (
        f"{path} is a LoRA adapter, not a model: give nemo_checkpoint= the model that it was trained on "
        f"({base or 'it does not say which'}), and adapter={path}"
    )
