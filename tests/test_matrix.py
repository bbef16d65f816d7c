# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Every cell of the support matrix: import, calibrate, export, read back."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
import torch

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.errors import ConfigError, PtqError
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.models.registry import family_of
from nemo_ptq.plan.rules import check_job
from nemo_ptq.quantization.algorithms import algorithm_named
from nemo_ptq.verify.forward_pass import logits
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint, same_bytes
from tests.families import TOKENS as VOCABULARY
from tests.matrix import (
    ALGORITHMS,
    CALIBRATIONS,
    DOCUMENT,
    KINDS,
    MODELS,
    RESULTS,
    Record,
    algorithms_of,
    carries,
    main,
    merged,
    missing,
    quick_first,
    read_reports,
    record,
    render,
)
from tests.ranks import run_ranks

# Tensor and pipeline parallelism of the files that each cell writes.
LAYOUTS = ((1, 1), (2, 1), (1, 2))
TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
QUICK = ("no_quant", "fp8", "int8_sq", "int4_awq")
# Relative distance of a token's logits, in the median over tokens. Both sides compute in float32 with the same weights.
# What is left beyond float32's own rounding are single tokens, whose activations fall to the other side of a boundary.
CLOSE = 1e-5


def cell_arguments(
    checkpoint: Path,
    algorithm: str,
    kv_cache: bool,
    output: Path,
    layout: tuple[int, int],
    format: str = "trtllm",
) -> dict[str, Any]:
    """The arguments of one cell's job, its calibration's parallelism apart."""
    return {
        "nemo_checkpoint": str(checkpoint),
        "export_config": ExportConfig(str(output), format, inference_tp=layout[0], inference_pp=layout[1]),
        "quantization_config": QuantizationConfig(algorithm, enable_kv_cache=kv_cache and algorithm != NO_QUANT),
        # The loop is replaced on the ranks; naming one here keeps the checks from asking for a data set.
        "forward_loop": print if algorithm_named(algorithm).needs_data else None,
    }


def run_cells(
    checkpoint: Path, algorithms: Sequence[str], calibration: tuple[int, int], kv_cache: bool, directory: Path
) -> dict[str, tuple[list[str], torch.Tensor | None]]:
    """Calibrates and exports a model with several algorithms, on this rank.

    Returns:
        For each algorithm, what is wrong with the packed weights, and the calibrated model's logits in float32 with
        those weights; None but on the last stage.
    """
    from nemo_ptq.plan.rules import check_job
    from tests import steps

    tp, pp = calibration
    results = {}
    for algorithm in algorithms:
        jobs = [
            check_job(
                world_size=tp * pp,
                calibration_tp=tp,
                calibration_pp=pp,
                **cell_arguments(checkpoint, algorithm, kv_cache, directory / f"{algorithm}-{i}x{j}", (i, j)),
            )
            for i, j in LAYOUTS
        ]
        steps.run_jobs(jobs)
        with steps.loaded(checkpoint, tp, pp) as model:
            steps.calibrate(model, jobs[0].quantization)
            results[algorithm] = (steps.serve(model, algorithm), steps.logits(model, TOKENS))
    return results


def check_cells(
    checkpoint: Path, model: str, algorithms: list[str], where: str, kv: bool, out: Path, record_property: Record
) -> None:
    tp, pp = map(int, where.split("x"))
    ranks = run_ranks(run_cells, tp * pp, checkpoint, algorithms, (tp, pp), kv, out)
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
        median = float(distance.median())
        assert median < CLOSE, f"{algorithm}: {median:.2e}"
        cell = {"model": model, "algorithm": algorithm, "calibration": where, "kv_cache": kv}
        record(record_property, "trtllm", **cell, distance=median)


# Of all models in test_every_cell.
@pytest.mark.parametrize("model", quick_first(MODELS, ("mixtral",)))
def test_calibrated_on_four_ranks_with_a_quantized_kv_cache(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path, record_property: Record
) -> None:
    algorithms = [algorithm for algorithm in QUICK if carries("trtllm", model, algorithm)]
    check_cells(checkpoint_of(model), model, algorithms, "2x2", True, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("kv_cache", [False, True])
@pytest.mark.parametrize("where", CALIBRATIONS)
@pytest.mark.parametrize("model", MODELS)
def test_every_cell(
    model: str,
    where: str,
    kv_cache: bool,
    checkpoint_of: Callable[[str], Path],
    tmp_path: Path,
    record_property: Record,
) -> None:
    check_cells(checkpoint_of(model), model, algorithms_of("trtllm", model), where, kv_cache, tmp_path, record_property)


@pytest.mark.parametrize("model", quick_first(MODELS, ("gpt", "llama31", "mixtral")))
def test_what_no_format_carries_is_refused_before_anything_starts(
    model: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for format in FORMATS:
        for algorithm in ALGORITHMS:
            job = cell_arguments(checkpoint_of(model), algorithm, False, tmp_path / "out", (1, 1), format)
            if carries(format, model, algorithm):
                check_job(world_size=1, **job)
            else:
                with pytest.raises(ConfigError) as caught:
                    check_job(world_size=1, **job)
                assert all(f"export_format={format}" in problem for problem in caught.value.problems)


def test_falcon_is_refused_by_name() -> None:
    with pytest.raises(PtqError, match=r"Falcon .* is not supported for quantization; supported: .*Llama"):
        family_of("FalconConfig7B")


def test_the_document_is_up_to_date() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert missing(results) == {}, "run `make support-matrix`"
    assert DOCUMENT.read_text(encoding="utf-8") == render(results), "run `make support-matrix`"


def write_report(path: Path, outcome: str, *records: tuple[str, dict[str, Any]]) -> Path:
    """A JUnit report of one test with these records."""
    properties = "".join(f"<property name='{kind}' value={quoteattr(json.dumps(value))}/>" for kind, value in records)
    path.write_text(f"<testsuite><testcase><properties>{properties}</properties>{outcome}</testcase></testsuite>")
    return path


def test_results_are_those_of_the_tests_that_passed(tmp_path: Path) -> None:
    cell = {"model": "gemma", "algorithm": "fp8"}
    passed = write_report(tmp_path / "1.xml", "", ("hf", {**cell, "outcome": "equal"}), ("other", {}))
    failed = write_report(tmp_path / "2.xml", "<failure/>", ("hf", {**cell, "outcome": "wrong"}))
    later = write_report(tmp_path / "3.xml", "", ("hf", {**cell, "outcome": "later"}))
    assert read_reports([passed, failed])["hf"] == [{**cell, "outcome": "equal"}]
    assert read_reports([passed, failed, later])["hf"] == [{**cell, "outcome": "later"}]


def test_a_model_of_a_kind_is_replaced_as_a_whole_or_not_at_all() -> None:
    old = {kind: [{**cell, "distance": 1.0} for cell in cells] for kind, cells in KINDS.items()}
    new: dict[str, list[Any]] = {kind: [] for kind in KINDS}

    def in_order(results: Any) -> list[str]:
        return sorted(json.dumps(result, sort_keys=True) for result in results)

    assert {kind: in_order(found) for kind, found in merged(old, new).items()} == {
        kind: in_order(found) for kind, found in old.items()
    }
    new["hf"] = [{**cell, "distance": 2.0} for cell in KINDS["hf"] if cell["model"] == "mixtral"]
    found = merged(old, new)
    assert in_order(found["hf"]) == in_order(
        [cell for cell in old["hf"] if cell["model"] != "mixtral"] + new["hf"],
    )
    assert in_order(found["nemo"]) == in_order(old["nemo"])
    new["hf"].pop()
    with pytest.raises(SystemExit, match=r"1 cells of hf have no result, .*'mixtral'"):
        merged(old, new)


def test_the_document_is_not_written_without_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.matrix.RESULTS", tmp_path / "results.json")
    monkeypatch.setattr("tests.matrix.DOCUMENT", tmp_path / "document.md")
    with pytest.raises(SystemExit, match="have no result"):
        main([write_report(tmp_path / "report.xml", "")])
    assert [path.name for path in tmp_path.iterdir()] == ["report.xml"]


def test_the_comparison_notices_another_model(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The distances above are small because the models are the same, not because logits always are."""
    found = []
    for model in ("llama2", "llama3"):
        (result,) = run_ranks(run_cells, 1, checkpoint_of(model), ["no_quant"], (1, 1), False, tmp_path / model)
        found.append(result["no_quant"][1])
    distance = (found[0] - found[1]).norm(dim=-1) / found[1].norm(dim=-1)
    assert torch.median(distance) > 0.1
