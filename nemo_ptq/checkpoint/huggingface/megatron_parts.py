# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face directory as Megatron has them. Nothing is read until a part is asked for."""

from functools import partial

import torch

from nemo_ptq.checkpoint.adapters.peft_adapter import PeftAdapter
from nemo_ptq.checkpoint.huggingface.description import HuggingFaceDescription
from nemo_ptq.checkpoint.huggingface.hf_weights import Weights
from nemo_ptq.checkpoint.huggingface.stored_tensors import PlannedPart, planned_parts
from nemo_ptq.checkpoint.parts import TensorPart, check_fits
from nemo_ptq.models.mapping import WeightRule
from nemo_ptq.models.state_space import STATE_PARAMETERS


def megatron_parts(
    model: HuggingFaceDescription, padded_vocab: int, adapter: PeftAdapter | None = None
) -> list[TensorPart]:
    """Plans every tensor.

    Args:
        model: The directory.
        padded_vocab: Rows of the embedding in Megatron.
        adapter: An adapter that is merged into them as they are read; None for none.
    """
    weights = Weights(model.tensors, adapter)
    sizes, dtype = (model.spec.num_query_groups, model.spec.head_size, padded_vocab), getattr(torch, model.dtype)

    def dtype_of(part: PlannedPart) -> torch.dtype:
        """The model's data type; a state space's own parameters keep theirs, since servers have them in float32."""
        return getattr(torch, model.tensors[part.names[0]].dtype) if part.rule.field in STATE_PARAMETERS else dtype

    def make(rule: WeightRule, names: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
        joined = rule.join(map(weights.read, names), *sizes)
        check_fits(names[0], joined, dtype)
        return joined.to(dtype)

    return [
        TensorPart(
            key=part.key,
            shape=part.rule.joined_shape([model.tensors[name].shape for name in part.names], padded_vocab),
            dtype=dtype_of(part),
            read=partial(make, part.rule, part.names, dtype_of(part)),
            position=part.position,
        )
        for part in planned_parts(model.hf_class, model.settings, model.spec)
    ]
