# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Experts in files: what servers load has sound scales for every expert, whatever it saw and whichever rank had it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_ptq.config import NO_QUANT, QuantizationConfig
from nemo_ptq.verify.checks import verify
from nemo_ptq.verify.forward_pass import logits
from tests.export.hugging_face import TOKENS, distance, transformers_logits
from tests.families import make_hf
from tests.ranks import run_ranks

EXPERTS = 8
# Two tokens, so that most of the experts see none.
FEW = [[5, 6]]
BOTH = ("compressed_tensors", "hf")
JOBS = {"fp8": BOTH, "int4_awq": BOTH[:1], "nvfp4": BOTH}
# And those whose scales do not depend on data.
ALL_JOBS = {
    **JOBS,
    "fp8": (*BOTH, "trtllm"),
    **{NO_QUANT: (*BOTH, "trtllm"), "fp8_dynamic": BOTH[:1], "int8_dynamic": BOTH[:1], "w4a16_nvfp4": BOTH},
}


def export(
    checkpoint: Path, ep: int, jobs: Mapping[str, Sequence[str]], tokens: list[list[int]] | None, directory: Path
) -> None:
    """Exports a mixture with several algorithms, each to ``directory / algorithm / format``, on this rank."""
    from tests import steps

    batches = None if tokens is None else [torch.tensor(tokens)]
    for algorithm, formats in jobs.items():
        quantization = QuantizationConfig(algorithm, evaluation_dataset_size=0, enable_kv_cache=False)
        steps.run_job(
            steps.job_of(checkpoint, quantization, directory / algorithm, (1, 1, ep), formats=list(formats)), batches
        )


def directories(root: Path, jobs: Mapping[str, Sequence[str]] = JOBS) -> list[Path]:
    return [root / algorithm / name for algorithm, formats in jobs.items() for name in formats]


@pytest.mark.parametrize("model", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_idle_experts_have_sound_scales(model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(export, 1, checkpoint_of(model), 1, JOBS, FEW, tmp_path)
    source = checkpoint_of(model).with_name(f"{model}.hf")
    for directory in directories(tmp_path):
        assert [check for check in verify(directory) if not check.ok] == []
        found = logits(directory, TOKENS)
        assert found.isfinite().all()
        assert distance(found, logits(source, TOKENS)) < 0.95, directory
        tensors = load_file(directory / "model.safetensors")
        scales = {name: tensor.float() for name, tensor in tensors.items() if ".experts." in name and "scale" in name}
        assert {name.split(".experts.")[1].split(".")[0] for name in scales} == set(map(str, range(EXPERTS)))
        assert all(scale.isfinite().all() and (scale >= 0).all() and scale.max() > 0 for scale in scales.values())


def test_the_library_reads_int4_experts(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_ranks(export, 1, checkpoint_of("mixtral"), 1, {"int4_awq": BOTH[:1]}, None, tmp_path)
    directory = tmp_path / "int4_awq" / "compressed_tensors"
    found, report = transformers_logits(directory)
    assert report == {}
    assert distance(logits(directory, TOKENS), found) < 1e-5
    names = load_file(directory / "model.safetensors").keys()
    fields = {name.rpartition(".")[2] for name in names if ".experts." in name}
    assert fields == {"weight_packed", "weight_scale", "weight_shape"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_spread_experts_are_the_same(model: str, tmp_path: Path) -> None:
    source = make_hf(model, tmp_path / "hf")
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    run_ranks(export, 1, source, 1, ALL_JOBS, None, alone, timeout=900.0)
    run_ranks(export, 2, source, 2, ALL_JOBS, None, spread, timeout=900.0)
    for one, other in zip(directories(alone, ALL_JOBS), directories(spread, ALL_JOBS), strict=True):
        assert [check for check in verify(other) if not check.ok] == []
        # The order in which tokens are added up is another one.
        assert distance(logits(other, TOKENS), logits(one, TOKENS)) < 0.02, other
