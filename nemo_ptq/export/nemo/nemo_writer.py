# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Format "nemo": a NeMo 2.0 checkpoint of the calibrated model, its weights not packed, its quantizers beside them.

NeMo resumes from it for quantization-aware training.
"""

from functools import partial
from pathlib import Path

from nemo_ptq.checkpoint.known_tensors import PREFIX
from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.checkpoint.writer import COMMON_STATE
from nemo_ptq.export.nemo_context import write_context
from nemo_ptq.export.sharded_model import write_sharded_model
from nemo_ptq.job import Job


def write_nemo(model: LoadedModel, job: Job, directory: Path) -> list[Path]:
    """Writes ``context/`` and ``weights/`` of a NeMo 2.0 checkpoint; every rank calls it.

    Args:
        model: This rank's part of the model, with its quantizers; tensors are stored in its data type.
        job: The job that exports it.
        directory: An existing directory that all ranks see.

    Returns:
        The files that this rank has written.
    """
    is_replaced = job.tokenizer_path is not None
    write_documents = partial(write_context, job.checkpoint, directory / "context", model.tokenizer, is_replaced)
    return write_sharded_model(model, directory / "weights", PREFIX, COMMON_STATE, write_documents)
