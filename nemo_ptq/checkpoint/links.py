# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Links in a checkpoint must not lead out of it: their targets would be copied into exports."""

import os
from collections.abc import Iterator
from pathlib import Path

from nemo_ptq.checkpoint.megatron.directories import is_megatron

# Files of a Hugging Face directory that are read as tensors, and not copied.
_WEIGHTS = (".safetensors", ".bin")


def links_out_of(checkpoint: Path) -> Iterator[Path]:
    """Yields the links among the files that exports copy from a checkpoint that lead out of it, or nowhere.

    In a Hugging Face hub cache, whose snapshots are links into the ``blobs/`` beside them, the blobs count as part of
    it.

    Args:
        checkpoint: A NeMo 2.0 checkpoint, whose ``context/`` is checked, or a Hugging Face directory. From a
            Megatron-LM checkpoint only the tokenizer is copied, which is checked when it is read.
    """
    root = _real(checkpoint)
    blobs = [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
    context = checkpoint / "context"
    if os.path.lexists(context):
        start = [context]
    elif is_megatron(checkpoint):
        start = []
    else:
        start = [entry for entry in sorted(checkpoint.glob("*")) if entry.suffix not in _WEIGHTS]
    yield from _links_out_of(start, [root, *blobs], set())


def _links_out_of(entries: list[Path], roots: list[Path], seen: set[Path]) -> Iterator[Path]:
    for entry in entries:
        target = _real(entry)
        is_inside = target.exists() and any(target.is_relative_to(root) for root in roots)
        if entry.is_symlink() and not is_inside:
            yield entry
        elif target.is_dir() and target not in seen:
            seen.add(target)
            yield from _links_out_of(sorted(entry.iterdir()), roots, seen)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
