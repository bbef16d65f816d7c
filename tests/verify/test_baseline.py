# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The model to compare with is the same whether it is read from the checkpoint or from an unquantized export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.baseline import open_baseline
from nemo_ptq.verify.forward import open_model, run_layers
from nemo_ptq.verify.reader import same_bytes
from tests.families import FAMILIES, TOKENS
from tests.ranks import run_ranks


def export_unquantized(checkpoint: Path, directory: Path) -> None:
    from nemo_ptq.config import ExportConfig, QuantizationConfig
    from nemo_ptq.task import ptq

    ptq(str(checkpoint), ExportConfig(str(directory)), quantization_config=QuantizationConfig("no_quant"))


@pytest.mark.parametrize(
    "name",
    ["llama32", "mixtral", "gemma", "starcoder", "nemotron", "gpt_geglu"],
)
def test_checkpoints_are_read_as_they_are_exported(
    name: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(name)
    run_ranks(export_unquantized, 1, checkpoint, tmp_path / "out")
    model = open_model(tmp_path / "out")
    tokens = torch.randint(0, TOKENS, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = run_layers(model, [tokens]).logits(0)
    sources = [checkpoint, checkpoint.with_name(f"{name}.hf")] if name in FAMILIES else [checkpoint]
    for source in sources:
        baseline = open_baseline(source, model)
        for tensor in model.names():
            found = baseline.tensor(tensor)
            exact = found.to(model.tensor(tensor).dtype)
            assert same_bytes(exact.contiguous(), model.tensor(tensor)), tensor
        # Gains that are stored minus one are not rounded a second time here.
        torch.testing.assert_close(run_layers(baseline, [tokens]).logits(0), expected, rtol=0.02, atol=0.05)


def test_another_model_is_refused(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(export_unquantized, 1, checkpoint_of("starcoder"), tmp_path / "out")
    baseline = open_baseline(checkpoint_of("mixtral"), open_model(tmp_path / "out"))
    with pytest.raises(PtqError, match="another model than the exported one"):
        baseline.tensor("transformer.layers.0.mlp.fc.weight")
    with pytest.raises(PtqError):
        open_baseline(tmp_path, open_model(tmp_path / "out"))
