# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Format compressed_tensors: transformers loads it with the library of that name, and computes the same logits.

So does the independent reader, from the files alone.
"""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from nemo_ptq.config import DTYPES, QuantizationConfig
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, export_cells, transformers_logits
from tests.families import FAMILIES
from tests.matrix import MIXTURES, Record, algorithms_of, quick_first, record
from tests.ranks import run_ranks

CHECKPOINT_OF = Callable[[str], Path]
# The others are in test_compressed_formats.py.
CALIBRATED = ("no_quant", "fp8", "int8_sq", "int4_awq")
# Relative distance of a token's logits, in the median over tokens. Both sides compute in float32 with the same weights,
# gains and biases, those that are folded rounded to bfloat16. What is left beyond float32's own rounding are single
# tokens, whose activations fall to the other side of a boundary.
CLOSE = 1e-5


@pytest.mark.matrix
@pytest.mark.parametrize("model", quick_first(list(FAMILIES), ("llama31", "nemotron")))
def test_transformers_computes_the_calibrated_models_logits(
    model: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path, record_property: Record
) -> None:
    tp = 1 if model == "starcoder" else 2
    algorithms = [algorithm for algorithm in algorithms_of("compressed_tensors", model) if algorithm in CALIBRATED]
    if model in MIXTURES:  # INT4 is in test_compressed_formats.py
        algorithms.remove("int4_awq")
    ranks = run_ranks(export_cells, tp, checkpoint_of(model), "compressed_tensors", algorithms, False, tp, tmp_path)
    for algorithm in algorithms:
        found, report = transformers_logits(tmp_path / algorithm)
        assert report == {}
        far = distance(found, ranks[0][algorithm])
        assert far < CLOSE, algorithm
        record(record_property, "compressed_tensors", model=model, algorithm=algorithm, distance=far)
        assert distance(logits(tmp_path / algorithm, TOKENS), found) < CLOSE, f"the reader, {algorithm}"


def test_transformers_quantizes_the_kv_cache(checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    ranks = run_ranks(export_cells, 1, checkpoint_of("llama31"), "compressed_tensors", ["fp8"], True, 1, tmp_path)
    found, report = transformers_logits(tmp_path / "fp8")
    assert report == {}
    assert distance(found, ranks[0]["fp8"]) < CLOSE
    assert distance(logits(tmp_path / "fp8", TOKENS), found) < CLOSE


def export_folded(checkpoint: Path, algorithm: str, directory: Path) -> None:
    """Exports a model in float32, smoothed and folded, with every quantizer off."""
    from dataclasses import replace

    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo_ptq.export.folding import foldable
    from nemo_ptq.export.huggingface.compressed_tensors import compressed_tensors_export
    from nemo_ptq.modelopt.transfer import apply_state
    from nemo_ptq.models.spec import spec_of
    from nemo_ptq.quantization.state import CalibrationState
    from tests import steps

    quantization = QuantizationConfig(algorithm)
    job = steps.job_of(checkpoint, quantization, directory, formats="compressed_tensors")
    with steps.loaded(checkpoint) as model:
        state = steps.learn(model, quantization)
    with steps.loaded(checkpoint) as model, patch.dict(DTYPES, float32="float32"):
        steps.in_float32(model)
        shape = spec_of(model.config, model.vocab_size)
        model.calibration = CalibrationState(state.header, foldable(state.tensors, shape, None))
        apply_state(model.module, model.calibration)
        for child in model.module.modules():
            if isinstance(child, TensorQuantizer):
                child.disable()
        export = compressed_tensors_export(steps.source_of(model, replace(job.export, dtype="float32")))
        steps.write(export.layout, export.pack, model, directory)
        export.write_documents(directory)


@pytest.mark.parametrize("algorithm", ["int8_sq", "int4_awq"])
@pytest.mark.parametrize(
    "model", quick_first([name for name in FAMILIES if name not in MIXTURES], ("llama31", "nemotron", "gemma"))
)
def test_folding_changes_nothing(model: str, algorithm: str, checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    """In float32, with quantization off: relative to the largest logit."""
    run_ranks(export_folded, 1, checkpoint_of(model), algorithm, tmp_path / "out")
    found, report = transformers_logits(tmp_path / "out")
    assert report == {}
    expected, _ = transformers_logits(checkpoint_of(model).with_name(f"{model}.hf"))
    size = min(found.shape[-1], expected.shape[-1])
    found, expected = found[..., :size], expected[..., :size]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_something_was_folded(checkpoint_of: CHECKPOINT_OF, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run_ranks(export_folded, 1, checkpoint_of("llama31"), "int8_sq", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(checkpoint_of("llama31").with_name("llama31.hf") / "model.safetensors")
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{name}.weight"
        assert not torch.allclose(found[name], original[name].float(), rtol=0.05), name
