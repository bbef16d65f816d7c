# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every cell of the support matrix: import, calibrate, export, read back."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.families import family_of
from nemo_ptq.preflight import check_job
from nemo_ptq.verify.forward import logits
from nemo_ptq.verify.reader import open_checkpoint, same_bytes
from tests.matrix import (
    ALGORITHMS,
    ALONE,
    CALIBRATIONS,
    DOCUMENT,
    LAYOUTS,
    REFUSED,
    RESULTS,
    ROWS,
    SPREAD,
    TOKENS,
    Cell,
    arguments,
    cells,
    layout_name,
    missing,
    render,
    run_cells,
)
from tests.ranks import run_ranks

MODELS = [model for row in ROWS for model in row.models]
QUICK = ("no_quant", "fp8", "int8_sq", "int4_awq")
# Relative distance of a token's logits, in the median over tokens. Both sides compute in float32 with the same weights.
# What is left beyond float32's own rounding are single tokens, whose activations fall to the other side of a boundary.
CLOSE = 1e-5


def supported(model: str, algorithms: tuple[str, ...]) -> list[str]:
    return [algorithm for algorithm in algorithms if (model, algorithm) not in REFUSED]


Record = Callable[[str, Any], None]


def check_cells(
    checkpoint: Path, model: str, algorithms: list[str], where: tuple[int, int], kv: bool, out: Path, record: Record
) -> None:
    ranks = run_ranks(run_cells, where[0] * where[1], checkpoint, algorithms, where, kv, out)
    for algorithm in algorithms:
        assert [problem for rank in ranks for problem in rank[algorithm][0]] == []
        first, *others = [open_checkpoint(out / f"{algorithm}-{i}x{j}") for i, j in LAYOUTS]
        for other in others:
            different = [name for name in first.names() if not same_bytes(first.tensor(name), other.tensor(name))]
            assert different == []
        expected = next(found for rank in ranks if (found := rank[algorithm][1]) is not None)
        found = logits(first.path, TOKENS)[..., : expected.shape[-1]]
        expected = expected[..., : found.shape[-1]]
        distance = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert distance.median() < CLOSE, f"{algorithm}: {distance.median():.2e}"
        cell = Cell(model, algorithm, layout_name(where), kv)
        record("cells", json.dumps({**asdict(cell), "distance": float(f"{distance.median():.1e}")}))


@pytest.mark.parametrize("model", MODELS)
def test_calibrated_on_four_ranks_with_a_quantized_kv_cache(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path, record_property: Record
) -> None:
    check_cells(checkpoint_of(model), model, supported(model, QUICK), SPREAD, True, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("where", CALIBRATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell(
    model: str,
    where: tuple[int, int],
    kv_cache: bool,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    check_cells(checkpoint_of(model), model, supported(model, ALGORITHMS), where, kv_cache, tmp_path, record_property)


@pytest.mark.parametrize(("model", "algorithm"), sorted(REFUSED))
def test_refused_cells_are_refused_before_anything_starts(
    model: str, algorithm: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"takes? quantized experts in fp8 only"):
        check_job(world_size=1, **arguments(checkpoint_of(model), algorithm, False, tmp_path / "out", (1, 1)))


def test_falcon_is_refused_by_name() -> None:
    with pytest.raises(PtqError, match=r"Falcon .* is not supported for quantization; supported: .*Llama"):
        family_of("FalconConfig7B")


def test_the_document_is_up_to_date() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert missing(results) == [], "run `make support-matrix`"
    assert len(results["cells"]) == len(cells())
    assert DOCUMENT.read_text(encoding="utf-8") == render(results), "run `make support-matrix`"


def test_the_comparison_notices_another_model(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The distances above are small because the models are the same, not because logits always are."""
    found = []
    for model in ("llama2", "llama3"):
        (result,) = run_ranks(run_cells, 1, checkpoint_of(model), ["no_quant"], ALONE, False, tmp_path / model)
        found.append(result["no_quant"][1])
    distance = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    assert torch.median(distance) > 0.1
