# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""NeMo checkpoints that the reader refuses; tests/verify/test_every_format.py has its logits."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_ptq.errors import PtqError
from nemo_ptq.verify.forward_pass import logits, open_model
from nemo_ptq.verify.nemo.nemo_model import _Quantizer

TOKENS = torch.zeros(1, 4, dtype=torch.int64)


@pytest.fixture
def copy(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_of("llama31"), tmp_path / "copy"))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            "attention_output_gate: false",
            "attention_output_gate: true",
            "attention_output_gate True, which the reader does not compute",
        ),
        ("rotary_interleaved: false", "rotary_interleaved: true", "rotary_interleaved True"),
        ("torch.nn.functional.silu", "torch.nn.functional.mish", "hidden_act 'mish' is not one of"),
        ("  num_layers: 2", "  layers: 2", "is not of a GPT-like model: KeyError"),
        ("config:", "settings:", "is not of a GPT-like model: KeyError"),
    ],
)
def test_a_model_that_is_not_computed_is_refused(before: str, after: str, said: str, copy: Path) -> None:
    file = copy / "context" / "model.yaml"
    content = file.read_text()
    assert before in content
    file.write_text(content.replace(before, after, 1))
    with pytest.raises(PtqError, match=said):
        open_model(copy)


def test_a_damaged_shard_is_an_error(copy: Path) -> None:
    shard = next((copy / "weights").glob("__0_0.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(PtqError, match=r"__0_0.distcp: module.* cannot be read"):
        logits(copy, TOKENS)
    (copy / "weights" / ".metadata").write_bytes(b"nothing")
    with pytest.raises(PtqError, match=r"\.metadata cannot be read"):
        open_model(copy)


def test_a_quantizer_that_is_not_known_is_an_error() -> None:
    with pytest.raises(PtqError, match=r"num_bits \(5, 2\)"):
        _Quantizer((5, 2), False, torch.ones(()))(torch.ones(4))


class _Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.victim,)


def test_nothing_in_the_index_is_run(copy: Path, tmp_path: Path) -> None:
    (copy / "weights" / ".metadata").write_bytes(pickle.dumps(_Hostile(tmp_path / "touched")))
    with pytest.raises(PtqError, match=r"\.metadata cannot be read"):
        open_model(copy)
    assert not (tmp_path / "touched").exists()
