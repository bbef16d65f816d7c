# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Loaded models against transformers' own, at every parallelism; nothing of the training machine remains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.errors import PtqError
from tests.families import FAMILIES, TELLING, make_hf, make_nemo
from tests.files import digests
from tests.ranks import run_ranks

TOKENS = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(5))


def logits_in_float32(checkpoint: Path, tp: int, pp: int) -> torch.Tensor | None:
    """The model's logits, computed in float32 from the weights as they were loaded; None but on the last stage."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_ptq.calibration.forward import forward_batches
    from tests.steps import loaded

    with loaded(checkpoint, tp=tp, pp=pp) as model:
        assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
        model.module.float()
        model.config.params_dtype = torch.float32
        (logits,) = forward_batches(model.module, [TOKENS])
        if logits is None:
            return None
        return gather_from_tensor_model_parallel_region(logits)[..., : model.vocab_size]


def transformers_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(TOKENS).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to float32 rounding, relative to the spread of the logits; padded vocabulary rows are left out."""
    difference = (found[..., : expected.shape[-1]] - expected).abs().max()
    assert difference < 5e-5 * expected.std()


# What tells one model from another, beyond sizes that tensors could not have otherwise.
COMPUTED = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "num_experts_per_tok"),
    *("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"),
)


def in_new_spelling(directory: Path) -> None:
    """Writes config.json as transformers 5 does."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    parameters = {name: config.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in config}
    file.write_text(json.dumps({**config, "rope_parameters": {**parameters, **scaling}}))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    source = make_hf(name, tmp_path / "hf", **TELLING[name])
    expected = transformers_logits(source)
    if "rope_theta" in json.loads((source / "config.json").read_text()):
        in_new_spelling(source)
    (found,) = run_ranks(logits_in_float32, 1, source, 1, 1)
    assert_close(found, expected)


@pytest.mark.parametrize("context", [64, 16])
def test_longrope_is_that_of_transformers(context: int, tmp_path: Path) -> None:
    """The tokens are fewer than the model was trained on first, or more, and then the longer factors apply."""
    assert 16 < TOKENS.shape[1] < 64
    scaling = {"type": "longrope", "short_factor": [1.0 + n / 8 for n in range(12)], "long_factor": [3.0] * 12}
    settings = {"rope_scaling": scaling, "partial_rotary_factor": 0.75, "original_max_position_embeddings": context}
    source = make_hf("phi3", tmp_path / "hf", **settings)
    (found,) = run_ranks(logits_in_float32, 1, source, 1, 1)
    assert_close(found, transformers_logits(source))


@pytest.mark.parametrize("name", ["llama31", "nemotron", "mixtral"])
def test_a_setting_that_is_lost_is_seen(name: str, tmp_path: Path) -> None:
    """The comparison above can fail: each setting that is left out of config.json moves the logits."""
    source = make_hf(name, tmp_path / "hf", **TELLING[name])
    expected = transformers_logits(source)
    file = source / "config.json"
    config = json.loads(file.read_text())
    for setting in [setting for setting in COMPUTED if config.get(setting)]:
        file.write_text(json.dumps({key: value for key, value in config.items() if key != setting}))
        (found,) = run_ranks(logits_in_float32, 1, source, 1, 1)
        with pytest.raises(AssertionError):
            assert_close(found, expected)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_parallelism_does_not_change_the_model(tp: int, pp: int, tmp_path: Path) -> None:
    # The vocabulary of 1003 tokens is padded to another size at each tensor parallelism.
    make_nemo("llama31", tmp_path / "nemo", num_layers=4)
    (alone,) = run_ranks(logits_in_float32, 1, tmp_path / "nemo", 1, 1)
    spread = run_ranks(logits_in_float32, tp * pp, tmp_path / "nemo", tp, pp)
    results = [logits for logits in spread if logits is not None]
    assert len(results) == tp
    for found in results:
        assert_close(found, alone)


def uneven_stages(checkpoint: Path) -> tuple[int, bool]:
    from nemo_ptq.calibration.forward import forward_batches
    from nemo_ptq.checkpoint.loading import load_model
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import process_groups
    from tests.steps import CPU

    with process_groups(read_launch(), CPU, pipeline_parallel=2):
        model = load_model(checkpoint, CPU, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=3)
        (logits,) = forward_batches(model.module, [TOKENS])
        return len(model.module.decoder.layers), logits is not None


def test_stages_may_be_uneven(tmp_path: Path) -> None:
    make_nemo("llama2", tmp_path / "nemo", num_layers=4)
    assert run_ranks(uneven_stages, 2, tmp_path / "nemo") == [(1, False), (3, True)]


def load_with(checkpoint: Path, options: dict[str, Any]) -> str:
    from nemo_ptq.checkpoint.loading import load_model
    from nemo_ptq.parallel.environment import read_launch
    from nemo_ptq.parallel.process_groups import process_groups
    from tests.steps import CPU

    with process_groups(read_launch(), CPU):
        try:
            model = load_model(checkpoint, CPU, **options)
        except PtqError as error:
            return f"refused: {error}"
        return model.tokenizer.tokenizer.name_or_path


def test_another_tokenizer_can_be_given(tmp_path: Path) -> None:
    make_nemo("llama2", tmp_path / "nemo")
    other = make_hf("llama3", tmp_path / "other")
    assert run_ranks(load_with, 1, tmp_path / "nemo", {"tokenizer_path": str(other)}) == [str(other)]


def test_loading_leaves_the_checkpoint_alone(tmp_path: Path) -> None:
    make_nemo("llama2", tmp_path / "nemo")
    before = digests(tmp_path / "nemo")
    run_ranks(load_with, 1, tmp_path / "nemo", {"tokenizer_path": None})
    assert digests(tmp_path / "nemo") == before


def test_a_checkpoint_without_an_embedding_is_refused(tmp_path: Path) -> None:
    make_nemo("llama2", tmp_path / "nemo")
    (message,) = run_ranks(load_without_embedding, 1, tmp_path / "nemo")
    assert "not the checkpoint of a GPT-like model" in message


def load_without_embedding(checkpoint: Path) -> str:
    from unittest.mock import patch

    from nemo_ptq.checkpoint import reader

    with patch.object(reader, "EMBEDDING_KEY", "embedding.nothing.weight"):
        return load_with(checkpoint, {})
