# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The reader's forward pass of a hybrid, against transformers' where that has the class, and against itself."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_ptq.verify.forward_pass import logits
from tests.hybrids import make_nemotron_h

TOKENS = torch.randint(0, 380, (2, 70), generator=torch.Generator().manual_seed(1))


def test_later_tokens_change_nothing_before_them(tmp_path: Path) -> None:
    directory = make_nemotron_h(tmp_path / "hf")
    changed = TOKENS.clone()
    changed[:, 40:] = 7
    found, other = logits(directory, TOKENS), logits(directory, changed)
    torch.testing.assert_close(found[:, :40], other[:, :40])
    assert not torch.allclose(found[:, 40:], other[:, 40:])


@pytest.mark.parametrize("name", ["A_log", "D", "dt_bias", "conv1d.bias", "conv1d.weight", "norm.weight"])
def test_every_tensor_of_a_state_space_counts(name: str, tmp_path: Path) -> None:
    directory = make_nemotron_h(tmp_path / "hf")
    before = logits(directory, TOKENS)
    tensors = load_file(directory / "model.safetensors")
    tensors[f"backbone.layers.0.mixer.{name}"] += 0.5
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert not torch.allclose(logits(directory, TOKENS), before, atol=1e-3)


def test_it_computes_what_transformers_does(tmp_path: Path) -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h", reason="transformers 5 has it")
    directory = make_nemotron_h(tmp_path / "hf", head_dim=64)
    model, report = modeling.NemotronHForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.inference_mode():
        expected = model.eval()(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(directory, TOKENS), expected, rtol=1e-4, atol=1e-4)
