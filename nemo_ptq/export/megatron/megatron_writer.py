# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Format "megatron": Megatron-LM's checkpoint of the calibrated model, its weights not packed, its quantizers beside.

Megatron-LM's own scripts train it on, or export it: it is a release, with the model's arguments in ``common.pt``.
"""

from functools import partial
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.loading import LoadedModel
from nemo_ptq.checkpoint.megatron.arguments import unknown_to_megatron
from nemo_ptq.checkpoint.megatron.directories import RELEASE
from nemo_ptq.checkpoint.megatron.writer import common_state, write_beside
from nemo_ptq.checkpoint.tokenizers import transformers_tokenizer
from nemo_ptq.errors import PtqError
from nemo_ptq.export.sharded_model import write_sharded_model
from nemo_ptq.job import Job
from nemo_ptq.models.registry import Family
from nemo_ptq.models.spec import ModelSpec


def check_exportable(shape: ModelSpec, family: Family, tokenizer: Any) -> None:
    """Refuses a model that Megatron-LM has no arguments for, and a tokenizer that cannot be kept beside it.

    Raises:
        PtqError: If it is one.
    """
    if problem := unknown_to_megatron(shape):
        raise PtqError(problem)
    transformers_tokenizer(tokenizer)


def write_megatron_lm(model: LoadedModel, job: Job, directory: Path) -> list[Path]:
    """Writes the root of a checkpoint with one release; every rank calls it.

    Args:
        model: This rank's part of the model, with its quantizers; tensors are stored in its data type.
        job: The job that exports it.
        directory: An existing directory that all ranks see.

    Returns:
        The files that this rank has written.
    """
    write_documents = partial(write_beside, directory, transformers_tokenizer(model.tokenizer))
    return write_sharded_model(model, directory / RELEASE, "", common_state(model.spec, model.config), write_documents)
