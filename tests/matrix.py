# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The support matrix: which cells there are, and the document that tells what came of them.

`make support-matrix` runs every cell, in the tests marked `matrix`, with pytest's JUnit report, from which
`python -m tests.matrix REPORT...` takes the results: docs/support_matrix.json, and docs/support_matrix.md made from it.
Reports of some formats or models alone will do where the others' results are there from before.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nemo_ptq.config import NO_QUANT
from nemo_ptq.export.formats import FORMATS
from tests.families import GPT_VARIANTS

DOCUMENT = Path(__file__).parent.parent / "docs" / "support_matrix.md"
RESULTS = DOCUMENT.with_suffix(".json")
ALGORITHMS = (
    *(NO_QUANT, "fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"),
    *("fp8_dynamic", "int8_dynamic", "w4a16_nvfp4"),
)
# What the document shows as far as it was run: no result of these is required yet. Of mixtures that is INT4 as well.
_AS_FAR_AS_RUN = {
    "hf": ("fp8_dynamic", "w4a16_nvfp4"),
    "compressed_tensors": ("w4a8_awq", "nvfp4", "fp8_dynamic", "int8_dynamic", "w4a16_nvfp4"),
    "megatron": ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"),
}
# Tensor x pipeline parallelism at which a model is calibrated for trtllm.
CALIBRATIONS = ("1x1", "2x2")

# What a test says of one cell: its keys, and what it found. And what pytest calls to write it into the JUnit report.
Result = Mapping[str, Any]
Record = Callable[[str, Any], None]


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
    Row("Mistral, Ministral", "7B; Nemo 12B, Small 3 24B; 8B", "llama", ("mistral",)),
    Row("Mixtral", "8x7B", "llama", ("mixtral",)),
    Row("Qwen 2, 2.5", "0.5B to 72B", "qwen2", ("qwen2",)),
    Row("Qwen 3", "0.6B to 32B", "qwen3", ("qwen3",)),
    Row("Qwen 3 MoE", "30B-A3B, 235B-A22B", "qwen3_moe", ("qwen3_moe",)),
    Row("Phi 3, 4", "3.8B, 14B", "llama", ("phi3",)),
    Row("Gemma 2", "2B, 9B, 27B", "gemma2", ("gemma2",)),
    Row("Gemma 3 (text)", "1B; 4B, 12B, 27B", "gemma3", ("gemma3",)),
)
MODELS = [model for row in ROWS for model in row.models]
MIXTURES = ("mixtral", "qwen3_moe")
# Scaled embeddings, a gate with GELU, and rotary embeddings that are scaled as the tiny models' are.
UNKNOWN_TO_MEGATRON = ("gemma", "gemma2", "gemma3", "gpt_geglu", "llama31", "llama32")


def quick_first(names: Sequence[str], quick: Sequence[str]) -> list[Any]:
    """Parameters of a test, of which all but the quick ones are marked slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def carries(format: str, model: str, algorithm: str) -> bool:
    """Whether a model that is quantized so goes into a format, by the format's record."""
    record = FORMATS[format]
    return (
        algorithm not in record.refused
        and not (record.is_hugging_face and model in GPT_VARIANTS)
        and not (record.model_obstacle is not None and model in UNKNOWN_TO_MEGATRON)
        and (model not in MIXTURES or algorithm in (NO_QUANT, *record.experts))
    )


def carried(format: str) -> list[tuple[str, str]]:
    """All models and algorithms that go into a format."""
    return [(model, algorithm) for model in MODELS for algorithm in ALGORITHMS if carries(format, model, algorithm)]


def algorithms_of(format: str, model: str) -> list[str]:
    """The algorithms with which a model goes into a format."""
    return [algorithm for algorithm in ALGORITHMS if carries(format, model, algorithm)]


def _of_format(format: str) -> list[Result]:
    later = _AS_FAR_AS_RUN.get(format, ())
    return [
        {"model": model, "algorithm": algorithm}
        for model, algorithm in carried(format)
        if algorithm not in later and not (model in MIXTURES and algorithm == "int4_awq")
    ]


def _jobs() -> list[Result]:
    return [
        {"model": model, "algorithm": algorithm, "calibration": calibration, "kv_cache": kv_cache}
        for model, algorithm in carried("trtllm")
        for calibration in CALIBRATIONS
        for kv_cache in (False, True)
    ]


# Every kind of result: the cells that must have one, by their keys. A test records a result under the kind's name.
#   trtllm              tests/test_matrix.py: "distance" of the logits of the files from the calibrated model's
#   modelopt            tests/peer/test_modelopt_exporter.py: "equal", or why ModelOpt's exporter to trtllm fails
#   hf                  tests/export/huggingface/test_unified.py: "equal" or "equal, but ..."
#                       to ModelOpt's; no_quant: "distance"
#   compressed_tensors  tests/export/huggingface/test_compressed_tensors.py: "distance" of transformers' logits;
#                       and test_compressed_formats.py: the same of the reader's from transformers'
#   nemo                tests/export/nemo/test_nemo_writer.py: what is "equal" after the checkpoint is restored
#   megatron            tests/export/megatron/test_megatron_writer.py: "distance" of the restored model's logits
KINDS: Mapping[str, list[Result]] = {
    "trtllm": _jobs(),
    "modelopt": _of_format("trtllm"),
    "hf": _of_format("hf"),
    "compressed_tensors": _of_format("compressed_tensors"),
    "nemo": _of_format("nemo"),
    "megatron": _of_format("megatron"),
}
_KEYS = ("model", "algorithm", "calibration", "kv_cache")


def record(record_property: Record, kind: str, **result: Any) -> None:
    """Records what a test has shown of a cell, which counts if the test passes; distances with two digits."""
    rounded = {key: float(f"{value:.1e}") if isinstance(value, float) else value for key, value in result.items()}
    record_property(kind, json.dumps(rounded))


def read_reports(reports: Iterable[Path]) -> dict[str, list[Result]]:
    """Takes from pytest's JUnit reports what the tests that passed have recorded; of a cell's results the last one.

    Returns:
        Results by kind, as :data:`KINDS` describes them.
    """
    found: dict[str, dict[str, Result]] = {kind: {} for kind in KINDS}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("failure") is None and case.find("error") is None:
                for entry in case.iter("property"):
                    if (kind := entry.get("name")) in KINDS:
                        result = json.loads(entry.attrib["value"])
                        found[kind][_key(result)] = result
    return {kind: [results[key] for key in sorted(results)] for kind, results in found.items()}


def _key(result: Result) -> str:
    return json.dumps([result[name] for name in _KEYS if name in result])


def missing(results: Mapping[str, Iterable[Result]]) -> dict[str, list[Result]]:
    """The cells that no result tells of, by kind; kinds without such cells are left out."""
    lost = {}
    for kind, cells in KINDS.items():
        shown = {_key(result) for result in results.get(kind, ())}
        if without := [cell for cell in cells if _key(cell) not in shown]:
            lost[kind] = without
    return lost


def merged(old: Mapping[str, list[Result]], new: Mapping[str, list[Result]]) -> dict[str, list[Result]]:
    """Replaces the results of a kind and model that are there anew, and keeps those that reports do not tell of at all.

    Raises:
        SystemExit: If a cell of a kind has no result.
    """
    results = {}
    for kind in KINDS:
        told = {result["model"] for result in new[kind]}
        kept = [result for result in old.get(kind, []) if result["model"] not in told]
        results[kind] = sorted([*kept, *new[kind]], key=_key)
    for kind, cells in missing(results).items():
        sys.exit(f"{len(cells)} cells of {kind} have no result, {cells[0]} among them: the document stays as it is")
    return results


_INTRODUCTION = """# Support matrix

Made by `make support-matrix` from the results of the tests; do not edit. One table for each
[export format](formats.md), families by algorithms.

The models are small ones of the family's true architecture, with random weights, which a rounding moves further than
trained ones: a number shows that the files are right, not what a quantization costs. **not run** is a cell whose test
has not been run for this document. All were imported from Hugging
Face directories; GPT, which has no class there, was made as a NeMo checkpoint.

**refused** is one line before anything starts, with the reason; what is refused is what
[docs/formats.md](formats.md) says a format cannot hold. Falcon: the family has never been supported for quantization.

Nemotron-H and Nemotron Nano v2 are in no table, since transformers 4 has no class for them: their jobs, at TP 1 and at
TP 2 x PP 2, are in `tests/engine/test_hybrids.py`. They go into `hf` and `compressed_tensors` with every algorithm that
the format takes; `trtllm`, `nemo` and `megatron` are refused.

NVFP4 is calibrated and packed on a CPU; ModelOpt simulates its rounding on GPUs only.
"""

_TRTLLM = """
A number is the largest distance, over the cell's jobs, between the logits that the independent reader computes from the
exported files and those of the calibrated model: in the median over tokens, relative to the logits' norm. For NVFP4 the
comparison uses the reader's own rounding.

A cell's jobs: calibrated at TP 1 and at TP 2 x PP 2, with the KV cache unquantized and in FP8, and exported for TP 1,
TP 2 and PP 2. Every directory passed all checks of `nemo-ptq verify`; the three layouts hold the same tensors; packed
weights equal those that the calibrated model simulates, but for rounding ties. Unquantized logits were compared with
transformers' as well (`tests/checkpoint/test_loading.py`).

**=** means that every tensor of the TP 1 export equals ModelOpt's own export bit for bit, KV-cache scales apart, which
ModelOpt drops for Megatron models. Where it is missing, ModelOpt's exporter fails:
{failures}"""

_HF = """
**=** means that every tensor and the quantization config equal what ModelOpt's `export_hf_checkpoint` writes for the
Hugging Face model with the same amaxes and pre-quantization scales, bit for bit; **= but gains**, that the gains of the
norms differ by ModelOpt's additional roundings (it folds into a gain that is kept minus one in three). Calibrated at
TP 2 (StarCoder 1: TP 1); in FP8 the KV cache is quantized, where the family has layers for its scales. Mixtral's
embedding and output layer were compared without the rows of padding, and StarCoder 1's output layer with the embedding
to which it was tied.

The number of no_quant is the distance of transformers' logits on the exported directory from its logits on the
original: in the median over tokens, relative to the logits' norm.
"""

_COMPRESSED_TENSORS = """
A number is the largest distance, over the family's models, between the logits that transformers computes from the
exported directory with the compressed-tensors library and those of the calibrated model: in float32, in the median over
tokens, relative to the logits' norm. transformers reported no missing or unexpected key, and generated text. Of
w4a8_awq, NVFP4 and the algorithms with dynamic activations it is the distance of transformers' logits from those of
this project's reader; the library decodes NVFP4 to bfloat16, where the reader computes in float32.
Calibrated at TP 2 (StarCoder 1: TP 1), the KV cache unquantized.
"""

_NEMO = """
**=** means, at TP 1 and TP 2, what is quantized with an FP8 KV cache: a fresh model has the calibrated model's tensors
(weights and amaxes) and computes its logits, exactly, when it is restored by this project's loader, and when it is
restored with NeMo's `restore_modelopt_state`; a `trtllm` export from the checkpoint has the bytes of the direct one;
and the checkpoint that is made straight from the Hugging Face directory, where there is one, restores the same model.
**= tensors**: all of this without logits, which take a GPU.
"""

_MEGATRON = """
A number is the largest distance, over TP 1 and PP 2, between the logits of a model that megatron-core builds of the
checkpoint's arguments and restores together with ModelOpt, and those of the calibrated model: in bfloat16, in the
median over tokens, relative to the logits' norm. Activations that fall to another code are most of it: it is 0.01 in
int4_awq, which does not round them. The restored scales equal those of the calibration. The KV cache is unquantized.

Not run are families whose layers megatron-core builds with Transformer Engine alone, and NVFP4, which ModelOpt
simulates on GPUs. The tiny models of Llama 3.1 and 3.2 scale their rotary embedding as Megatron-LM cannot, and are
refused; Llama 2 and 3 stand for the row.
"""


def _table(cell: Callable[[Row, str], str]) -> list[str]:
    """A table of families and algorithms."""
    return [
        "| Family | " + " | ".join(ALGORITHMS) + " |",
        "|" + "---|" * (1 + len(ALGORITHMS)),
        *(f"| {row.name} | " + " | ".join(cell(row, algorithm) for algorithm in ALGORITHMS) + " |" for row in ROWS),
        "| Falcon | " + " | ".join(["refused"] * len(ALGORITHMS)) + " |",
    ]


def render(results: Mapping[str, Sequence[Result]]) -> str:
    """Returns the document that tells the results."""

    def of(kind: str, row: Row, algorithm: str) -> list[Result]:
        return [
            result
            for result in results.get(kind, ())
            if result["model"] in row.models and result["algorithm"] == algorithm
        ]

    def trtllm(row: Row, algorithm: str) -> str:
        equal = all(result["outcome"] == "equal" for result in of("modelopt", row, algorithm))
        return f"{_shown(of('trtllm', row, algorithm))}{' =' if equal else ''}"

    def cell_of(format: str) -> Callable[[Row, str], str]:
        def cell(row: Row, algorithm: str) -> str:
            if not any(carries(format, model, algorithm) for model in row.models):
                return "refused"
            return trtllm(row, algorithm) if format == "trtllm" else _shown(of(format, row, algorithm))

        return cell

    failures = "".join(
        f"\n- {result['model']}, {result['algorithm']}: it {result['outcome']}"
        for result in results["modelopt"]
        if result["outcome"] != "equal"
    )
    legends = {
        "trtllm": _TRTLLM.format(failures=failures + "\n"),
        "hf": _HF,
        "compressed_tensors": _COMPRESSED_TENSORS,
        "nemo": _NEMO,
        "megatron": _MEGATRON,
    }
    lines = [_INTRODUCTION, "| Family | sizes users have | TensorRT-LLM's decoder |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.sizes} | {row.decoder} |" for row in ROWS]
    lines += ["| Falcon | 7B, 40B | |"]
    for format, record in FORMATS.items():
        lines += ["", f"## {format}", "", f"{record.summary[0].upper()}{record.summary[1:]}.", ""]
        lines += [*_table(cell_of(format)), legends[format].rstrip("\n")]
    return "\n".join(lines) + "\n"


# How the document says an outcome; of several, the last of these.
_OUTCOMES = {"equal": "=", "equal, but for gains": "= but gains", "equal tensors": "= tensors"}


def _shown(results: Sequence[Result]) -> str:
    """The largest distance, or the weakest outcome; what was not run says so."""
    if not results:
        return "yes, not run"
    distances = [result["distance"] for result in results if "distance" in result]
    if distances:
        return f"yes {max(distances):.0e}" if any(distances) else "yes 0"
    return f"yes {_OUTCOMES[max((result['outcome'] for result in results), key=list(_OUTCOMES).index)]}"


def main(reports: Sequence[Path]) -> None:
    """Writes the document, if every cell has passed."""
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    new = read_reports(reports)
    results = merged(old, new)
    kinds = (f'"{kind}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]" for kind, found in results.items())
    RESULTS.write_text("{" + ",\n".join(kinds) + "}\n", encoding="utf-8")
    DOCUMENT.write_text(render(results), encoding="utf-8")
    told = ", ".join(f"{len(found)} of {kind}" for kind, found in new.items() if found)
    print(f"wrote {DOCUMENT} from these results: {told}; the others are as they were")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
