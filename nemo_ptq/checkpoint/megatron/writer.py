# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint that Megatron-LM takes: torch_dist files, and the arguments of the model beside them.

It is a release, as Megatron-LM calls a checkpoint without an iteration: ``--load`` finds the model, and no optimizer.
``--use-checkpoint-args`` takes the sizes from it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.checkpoint.megatron.arguments import megatron_arguments, unknown_to_megatron
from nemo_ptq.checkpoint.megatron.directories import LATEST, RELEASE, TOKENIZER
from nemo_ptq.checkpoint.parts import TensorPart
from nemo_ptq.checkpoint.writer import COMMON_STATE, write_tensors
from nemo_ptq.errors import PtqError
from nemo_ptq.models.spec import ModelSpec


def write_megatron(
    directory: Path, model: ModelSpec, config: Any, parts: Sequence[TensorPart], tokenizer: Any | None
) -> None:
    """Writes a checkpoint.

    Args:
        directory: An empty directory, the root of the checkpoint.
        model: The model.
        config: NeMo's configuration of it, as attributes.
        parts: Every part of every tensor.
        tokenizer: Hugging Face's, kept beside the files; None for none.

    Raises:
        PtqError: If Megatron-LM has no arguments for such a model.
    """
    if problem := unknown_to_megatron(model):
        raise PtqError(f"{problem}: choose another format")
    write_tensors(directory / RELEASE, parts, "", common_state(model, config))
    write_beside(directory, tokenizer)


def common_state(model: ModelSpec, config: Any) -> Mapping[str, Any]:
    """Returns the state beside the tensors: Megatron-LM's arguments, and nothing of a training job.

    Args:
        model: The model, one that Megatron-LM knows.
        config: NeMo's configuration of it, as attributes.
    """
    arguments = megatron_arguments(model, config)
    arguments.params_dtype = getattr(config, "params_dtype", torch.bfloat16)
    named = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0}
    return {**named, "content_metadata": COMMON_STATE["content_metadata"]}


def write_beside(directory: Path, tokenizer: Any | None) -> None:
    """Writes the tokenizer and the tracker of a release of Megatron-LM's.

    Args:
        directory: The root of the checkpoint.
        tokenizer: Hugging Face's; None for none.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(directory / RELEASE / TOKENIZER)
    (directory / LATEST).write_text(RELEASE, encoding="utf-8")
