# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The support matrix: which cells there are, how one is run, and the document that tells what came of them.

`make support-matrix` runs every cell, in tests/test_matrix.py and tests/peer/, with pytest's JUnit report, from which
`python -m tests.matrix REPORT` takes the results: docs/support_matrix.json, and docs/support_matrix.md made from it.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from tests.families import TOKENS as VOCABULARY

DOCUMENT = Path(__file__).parent.parent / "docs" / "support_matrix.md"
RESULTS = DOCUMENT.with_suffix(".json")
ALGORITHMS = ("no_quant", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
# Tensor and pipeline parallelism of the files that each cell writes.
LAYOUTS = ((1, 1), (2, 1), (1, 2))
# Layouts at which a model is calibrated.
ALONE, SPREAD = (1, 1), (2, 2)
CALIBRATIONS = (ALONE, SPREAD)
TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Row:
    """A family as the document names it, and the tiny models of it in tests/families.py."""

    name: str
    sizes: str
    decoder: str
    models: tuple[str, ...]


ROWS = (
    Row("GPT / gptnext", "2B, 8B, 43B", "gpt", ("gpt", "gpt_geglu", "gpt_swiglu")),
    Row("Nemotron-3, Nemotron-4", "8B, 22B; 15B, 340B", "gpt", ("nemotron",)),
    Row("Llama 2, 3, 3.1, 3.2", "1B to 405B", "llama", ("llama2", "llama3", "llama31", "llama32")),
    Row("Gemma 1", "2B, 7B", "gemma", ("gemma",)),
    Row("StarCoder 1", "15B", "gpt", ("starcoder",)),
    Row("StarCoder 2", "3B, 7B, 15B", "gpt", ("starcoder2",)),
    Row("Mistral", "7B", "llama", ("mistral",)),
    Row("Mixtral", "8x7B", "llama", ("mixtral",)),
)
# A TensorRT-LLM checkpoint describes quantized experts in FP8 only.
REFUSED = {("mixtral", algorithm) for algorithm in ("int8_sq", "int4_awq", "w4a8_awq", "nvfp4")}


def arguments(
    checkpoint: Path, algorithm: str, kv_cache: bool, output: Path, layout: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of one cell's job, its calibration's parallelism apart."""
    return {
        "nemo_checkpoint": str(checkpoint),
        "export_config": ExportConfig(path=str(output), inference_tp=layout[0], inference_pp=layout[1]),
        "quantization_config": QuantizationConfig(algorithm, enable_kv_cache=kv_cache and algorithm != NO_QUANT),
        # The loop is replaced on the ranks; naming one here keeps the checks from asking for a data set.
        "forward_loop": print,
    }


def run_cells(
    checkpoint: Path, algorithms: Sequence[str], calibration: tuple[int, int], kv_cache: bool, directory: Path
) -> dict[str, tuple[list[str], torch.Tensor | None]]:
    """Calibrates and exports a model with several algorithms, on this rank.

    Returns:
        For each algorithm, what is wrong with the packed weights, and the calibrated model's logits in float32 with
        those weights; None but on the last stage.
    """
    from nemo_ptq import engine
    from nemo_ptq.calibration.forward import run_batches
    from nemo_ptq.console import Reporter
    from nemo_ptq.preflight import check_job
    from nemo_ptq.runtime import process_groups
    from tests import steps

    tp, pp = calibration
    silent, batches = Reporter(enabled=False), steps.random_batches()

    def loop(module: torch.nn.Module) -> None:
        for _ in run_batches(module, batches):
            pass

    results = {}
    steps.quiet_libraries()
    with process_groups(steps.read_launch(), steps.CPU, tensor_parallel=tp, pipeline_parallel=pp):
        for algorithm in algorithms:
            jobs = [
                check_job(
                    world_size=tp * pp,
                    calibration_tp=tp,
                    calibration_pp=pp,
                    **arguments(checkpoint, algorithm, kv_cache, directory / f"{algorithm}-{i}x{j}", (i, j)),
                )
                for i, j in LAYOUTS
            ]
            model = engine.load(jobs[0], steps.CPU)
            engine.calibrate(model, jobs[0].quantization, jobs[0].decoder, loop, silent)
            for job in jobs:
                engine.export(model, job, silent)
            results[algorithm] = (steps.serve(model, algorithm), steps.logits(model, TOKENS))
    return results


@dataclass(frozen=True, order=True)
class Cell:
    """One job of the matrix.

    Attributes:
        model: The tiny model.
        algorithm: How it is quantized.
        calibration: Tensor x pipeline parallelism of the calibration, e.g. "2x2".
        kv_cache: Whether its KV cache is quantized.
    """

    model: str
    algorithm: str
    calibration: str
    kv_cache: bool


def layout_name(layout: tuple[int, int]) -> str:
    """Names a parallelism, e.g. "2x2"."""
    return "x".join(map(str, layout))


def cells() -> list[Cell]:
    """All jobs of the matrix."""
    return sorted(
        Cell(model, algorithm, layout_name(calibration), kv_cache)
        for row in ROWS
        for model in row.models
        for algorithm in ALGORITHMS
        if (model, algorithm) not in REFUSED
        for calibration in CALIBRATIONS
        for kv_cache in (False, True)
    )


def read_report(report: Path) -> dict[str, list[dict[str, Any]]]:
    """Takes from pytest's JUnit report what the tests that passed have recorded.

    Returns:
        "cells": a :class:`Cell` each, with the "distance" of its logits; "modelopt": for a "model" and an "algorithm",
        whether ModelOpt's export is "equal", else how it fails.
    """
    found: dict[str, list[dict[str, Any]]] = {"cells": [], "modelopt": []}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            for record in case.iter("property"):
                if record.get("name") in found:
                    found[record.attrib["name"]].append(json.loads(record.attrib["value"]))
    return {kind: sorted(results, key=json.dumps) for kind, results in found.items()}


def missing(results: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Cell]:
    """The cells of the matrix that no result tells of."""
    shown = {Cell(*(result[name] for name in Cell.__annotations__)) for result in results["cells"]}
    return [cell for cell in cells() if cell not in shown]


_LEGEND = """
A number is the largest distance, over the cell's jobs, between the logits that the independent reader computes from the
exported files and those of the calibrated model: in the median over tokens, relative to the logits' norm. The models
have random weights, which a rounding moves further than a trained one: the number shows that the files are right, not
what a quantization costs.

A cell's jobs: a small model of the family's true architecture was imported from a Hugging Face directory (GPT: made as
a NeMo checkpoint), calibrated at TP 1 and at TP 2 x PP 2, with the KV cache unquantized and in FP8, and exported for
TP 1, TP 2 and PP 2. Every directory passed all checks of `nemo-ptq verify`; the three layouts hold the same tensors;
packed weights equal those that the calibrated model simulates, but for rounding ties. Unquantized logits were compared
with transformers' as well (`tests/checkpoint/test_loading.py`).

**=** means that every tensor of the TP 1 export equals ModelOpt's own export bit for bit, KV-cache scales apart, which
ModelOpt drops for Megatron models. Where it is missing, ModelOpt's exporter fails:
{failures}
**refused** is one line before anything starts. Mixtral: the readers take quantized experts in FP8 only. Falcon: the
family has never been supported for quantization.

NVFP4 is calibrated and packed on a CPU; ModelOpt simulates its rounding on GPUs only, so the comparison uses the
reader's own rounding there.
"""


def render(results: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    """Returns the document that tells the results."""
    modelopt = {(result["model"], result["algorithm"]): result["outcome"] for result in results["modelopt"]}
    lines = [
        "# Support matrix",
        "",
        "Made by `make support-matrix` from the results of the tests; do not edit.",
        "",
        "| Family | sizes users have | decoder | " + " | ".join(ALGORITHMS) + " |",
        "|" + "---|" * (3 + len(ALGORITHMS)),
    ]
    for row in ROWS:
        shown = []
        for algorithm in ALGORITHMS:
            distances = [
                result["distance"]
                for result in results["cells"]
                if result["model"] in row.models and result["algorithm"] == algorithm
            ]
            equal = all(modelopt.get((model, algorithm)) == "equal" for model in row.models)
            shown.append(f"yes {max(distances):.0e}{' =' if equal else ''}" if distances else "refused")
        lines.append(f"| {row.name} | {row.sizes} | {row.decoder} | " + " | ".join(shown) + " |")
    lines.append("| Falcon | 7B, 40B | | " + " | ".join(["refused"] * len(ALGORITHMS)) + " |")
    failures = "".join(
        f"\n- {model}, {algorithm}: it {outcome}"
        for (model, algorithm), outcome in modelopt.items()
        if outcome != "equal"
    )
    return "\n".join(lines) + "\n" + _LEGEND.format(failures=failures + "\n")


def main(report: Path) -> None:
    """Writes the document, if every cell has passed."""
    results = read_report(report)
    if lost := missing(results):
        sys.exit(f"{len(lost)} cells have no result, {lost[0]} among them: the document stays as it is")
    kinds = (f'"{kind}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]" for kind, found in results.items())
    RESULTS.write_text("{" + ",\n".join(kinds) + "}\n", encoding="utf-8")
    DOCUMENT.write_text(render(results), encoding="utf-8")
    print(f"wrote {DOCUMENT} from {len(results['cells'])} jobs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
