# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The support matrix: which cells there are, how one is run, and docs/support_matrix.md, made from them.

`python -m tests.matrix` (make support-matrix) writes the document; tests/test_matrix.py runs every cell that it lists
and fails when it is stale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_ptq.config import NO_QUANT, ExportConfig, QuantizationConfig
from tests.families import TOKENS as VOCABULARY

DOCUMENT = Path(__file__).parent.parent / "docs" / "support_matrix.md"
ALGORITHMS = ("no_quant", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4")
# Tensor and pipeline parallelism of the files that each cell writes.
LAYOUTS = ((1, 1), (2, 1), (1, 2))
# Layouts at which a model is calibrated.
ALONE, SPREAD = (1, 1), (2, 2)
# A single key and value head cannot be calibrated at TP 2.
ONE_KV_HEAD = ("starcoder",)
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


_LEGEND = """
**yes** means: a small model of the family's true architecture was imported from a Hugging Face directory (GPT: made
as a NeMo checkpoint), calibrated at TP 1 and at TP 2 x PP 2 (StarCoder 1, with its one KV head: PP 2), with the KV
cache unquantized and in FP8, and exported for TP 1, TP 2 and PP 2. Every directory passed all checks of `nemo-ptq
verify`; the three layouts hold the same tensors; packed weights equal those that the calibrated model simulates, but
for rounding ties; and the logits that the independent reader computes from the files agree with the calibrated
model's, unquantized ones with transformers' (`tests/checkpoint/test_loading.py`). The models have random weights:
this shows that the files are right, not what a quantization costs.

Every tensor of the TP 1 export equals ModelOpt's own export bit for bit, KV-cache scales apart, which ModelOpt drops
for Megatron models. `tests/peer/test_modelopt_exporter.py` lists the cells, and those where ModelOpt's exporter
fails.

**refused** is one line before anything starts. Mixtral: the readers take quantized experts in FP8 only. Falcon: the
family has never been supported for quantization.

NVFP4 is calibrated and packed on a CPU; ModelOpt simulates its rounding on GPUs only, so the comparison uses the
reader's own rounding there.
"""


def render() -> str:
    """Returns the document."""
    lines = [
        "# Support matrix",
        "",
        "Made by `make support-matrix` from the cells that `tests/test_matrix.py` runs; do not edit.",
        "",
        "| Family | sizes users have | decoder | " + " | ".join(ALGORITHMS) + " |",
        "|" + "---|" * (3 + len(ALGORITHMS)),
    ]
    for row in ROWS:
        cells = ("refused" if (row.models[0], algorithm) in REFUSED else "yes" for algorithm in ALGORITHMS)
        lines.append(f"| {row.name} | {row.sizes} | {row.decoder} | " + " | ".join(cells) + " |")
    lines.append("| Falcon | 7B, 40B | | " + " | ".join(["refused"] * len(ALGORITHMS)) + " |")
    return "\n".join(lines) + "\n" + _LEGEND


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
