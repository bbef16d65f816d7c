# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Models that are built without NeMo are those that NeMo's own classes make, to the bit."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest
import torch

from tests.families import FAMILIES, GPT_VARIANTS, TELLING, make_hf, make_nemo
from tests.ranks import run_ranks

TOKENS = torch.randint(0, 372, (2, 40), generator=torch.Generator().manual_seed(5))
# Fields that training reads.
NOT_COMPUTED = {
    *("attention_softmax_in_fp32", "cross_entropy_fusion_impl", "deallocate_pipeline_outputs"),
    *("moe_aux_loss_coeff", "moe_grouped_gemm", "init_method", "output_layer_init_method", "embedding_init_method"),
}


def looked_at(checkpoint: Path) -> dict[str, Any]:
    """What tells one model from another: its configuration, the names of its tensors, logits and tokens."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_ptq.calibration.forward import forward_batches
    from nemo_ptq.calibration.tokens import tokenize
    from tests.steps import loaded

    with loaded(checkpoint) as model:
        (logits,) = forward_batches(model.module, [TOKENS])
        fields = {field.name for field in dataclasses.fields(TransformerConfig)} - NOT_COMPUTED
        config = {name: getattr(model.config, name) for name in fields}
        # Functions of one name are ours and NeMo's: their values are in the logits.
        config |= {name: value.__name__ for name, value in config.items() if callable(value)}
        sharded = model.module.sharded_state_dict()
        return {
            **config,
            "class": model.config_class,
            "spec": model.spec,
            "sharded": {name: getattr(entry, "key", None) for name, entry in sharded.items()},
            "logits": logits.tolist(),
            "tokens": tokenize(model.tokenizer, "</s> def add(a, b)", 32),
            "text": model.tokenizer.ids_to_text([10, 1, 50]),
        }


def differences_from_nemo(name: str, directory: Path) -> list[str]:
    from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel
    from nemo_ptq.checkpoint.reader import NemoCheckpoint

    return list(_differences(name, directory, NemoCheckpoint, HuggingFaceModel))


def _differences(name: str, directory: Path, *readers: type) -> Iterator[str]:
    checkpoint = make_nemo(name, directory / "nemo") if name in GPT_VARIANTS else directory / "hf"
    if name in FAMILIES:
        make_hf(name, checkpoint, **TELLING[name])
    ours = looked_at(checkpoint)
    for reader in readers:
        patch.object(reader, "fields", PropertyMock(return_value=None)).start()
    nemos = looked_at(checkpoint)
    for key in nemos:
        if ours[key] != nemos[key]:
            yield f"{key}: {str(nemos[key])[:100]} is {str(ours[key])[:100]}"


@pytest.mark.parametrize("name", [*FAMILIES, *GPT_VARIANTS])
def test_the_model_is_nemos(name: str, tmp_path: Path) -> None:
    assert run_ranks(differences_from_nemo, 1, name, tmp_path) == [[]]
