# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What of a context becomes a field of a model that is built without NeMo, and what is left to NeMo."""

import math
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.checkpoint.allowed_names import AllowedNames
from nemo_ptq.checkpoint.metadata import read_model
from tests.conftest import Demo
from tests.hostile import NOTHING_TRUSTED, change_graph, copy_of, leaf, pyref, with_argument


def fields_of(checkpoint: Path, allowed: AllowedNames = NOTHING_TRUSTED) -> Any:
    from nemo_ptq.checkpoint.model_fields import fields_in_context

    return fields_in_context(checkpoint, read_model(checkpoint, allowed), allowed)


@pytest.fixture
def checkpoint(demo: Demo, tmp_path: Path) -> Path:
    return copy_of(demo.checkpoint, tmp_path / "checkpoint")


def give(checkpoint: Path, name: str, value: Any) -> None:
    change_graph(checkpoint, lambda graph: with_argument(graph, "llama_config", name, value))


def change_yaml(checkpoint: Path, old: str, new: str) -> None:
    file = checkpoint / "context" / "model.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_defaults_are_those_that_nemo_has_written(checkpoint: Path) -> None:
    change_yaml(checkpoint, "rotary_percent: 1.0", "rotary_percent: 0.5")
    assert fields_of(checkpoint).fields["rotary_percent"] == 0.5


def test_io_json_counts(checkpoint: Path) -> None:
    change_yaml(checkpoint, "rotary_base: 10000.0", "rotary_base: 5.0")
    assert math.isclose(fields_of(checkpoint).fields["rotary_base"], 10000.0)


def test_nothing_of_training_becomes_a_field(checkpoint: Path, tmp_path: Path) -> None:
    """Megatron writes its arguments into the directory that this one names."""
    change_yaml(checkpoint, "config_logger_dir: ''", f"config_logger_dir: {tmp_path / 'log'}")
    fields = fields_of(checkpoint).fields
    assert not {"config_logger_dir", "init_method", "data_step_fn", "timers"} & fields.keys()


def test_names_are_what_they_stand_for(checkpoint: Path) -> None:
    import torch

    give(checkpoint, "params_dtype", pyref("torch.float16"))
    give(checkpoint, "activation_func", pyref("torch.nn.functional.relu"))
    fields = fields_of(checkpoint).fields
    assert (fields["params_dtype"], fields["activation_func"]) == (torch.float16, torch.nn.functional.relu)


@pytest.mark.parametrize(
    ("field", "value", "trusted"),
    [
        ("activation_func", pyref("nemo.collections.llm.fn.activation.quick_gelu"), ()),
        ("activation_func", pyref("my_models.mine"), ("my_models.mine",)),
        ("multi_latent_attention", leaf(True), ()),
        ("mtp_num_layers", leaf(1), ()),
        ("vocab_size", leaf(2048), ("nemo.collections.llm.gpt.model.llama.LlamaModel",)),
    ],
)
def test_what_is_not_known_is_left_to_nemo(field: str, value: Any, trusted: tuple[str, ...], checkpoint: Path) -> None:
    give(checkpoint, field, value)
    assert fields_of(checkpoint, AllowedNames(trusted)) is None


def test_a_tokenizer_that_is_not_known_is_left_to_nemo(checkpoint: Path) -> None:
    assert fields_of(checkpoint).load_tokenizer is not None
    change_graph(checkpoint, lambda graph: with_argument(graph, "auto_tokenizer", "eos_token", leaf("<end>")))
    assert fields_of(checkpoint).load_tokenizer is None
