# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the exports that servers are tried with, and what our reader predicts of each (`make serve-exports`).

    python -m tests.serve.exports DIRECTORY

DIRECTORY gets an export in each `CELLS`' path, and `requests.json`: a list of objects with "directory" (the export's
path below DIRECTORY), "tokens" (texts of token ids) and "log_probs" (what our reader gives the second and following
tokens of each text). A machine that has a server needs nothing else of this project.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from demo.build import CALIBRATION, CHECKPOINT, HELDOUT
from nemo_ptq.config import FAST, NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.quantization.algorithms import ALGORITHMS
from tests.families import TOKENS as VOCABULARY
from tests.families import make_hf
from tests.ranks import run_ranks

DEMO = "demo"
FAMILIES = {
    "llama31": "Llama",
    "llama32": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen 3 MoE",
    "phi3": "Phi 3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "starcoder": "StarCoder",
    "starcoder2": "StarCoder 2",
    "nemotron": "Nemotron",
}
"""Tiny models of tests/families.py, and the name of each one's family in the table of servers."""
_OF_EVERY_FAMILY = ("fp8", "int4_awq", "nvfp4", "int8_dynamic", NO_QUANT)
TIED = ("llama32", "qwen3", "gemma", "gemma2", "gemma3")
EXPERTS, ONE_PROJECTION = ("mixtral", "qwen3_moe"), ("phi3", "starcoder")
REFUSED = (("int4_awq", "hf"), ("w4a8_awq", "hf"))
"""Algorithms that vLLM refuses in a format."""
_CPU_KERNELS = [(algorithm, "compressed_tensors") for algorithm in ("int8_sq", "int4_awq", "int8_dynamic")]
SERVED_FORMATS = ("hf", "compressed_tensors")
TEXTS, TOKENS, RANDOM_TOKENS = 6, 160, 48


@dataclass(frozen=True)
class Cell:
    """An export that a server is tried with.

    Attributes:
        model: "demo", or a tiny model of tests/families.py.
        algorithm: What it is quantized with.
        format: The export's format.
        kv_cache: Whether its KV cache is quantized.
    """

    model: str
    algorithm: str
    format: str
    kv_cache: bool = False

    @property
    def path(self) -> str:
        """The export's directory."""
        return f"{self.model}/{self.algorithm}{'-kv' if self.kv_cache else ''}/{self.format}"

    @property
    def family(self) -> str:
        """Name of the model's family in the table of servers."""
        return FAMILIES.get(self.model, "Llama")

    @property
    def tied_embeddings(self) -> bool:
        """Whether the model's output layer is its embedding."""
        return self.model in TIED

    @property
    def is_refused(self) -> bool:
        """Whether vLLM refuses it."""
        return (self.algorithm, self.format) in REFUSED

    @property
    def runs_on_a_cpu(self) -> bool:
        """Whether vLLM's CPU build has the kernels."""
        if self.algorithm == NO_QUANT:
            return True
        is_dense = self.model not in EXPERTS
        return is_dense and (self.algorithm, self.format) in _CPU_KERNELS


def _cells() -> Iterator[Cell]:
    for model in (DEMO, *FAMILIES):
        is_demo, has_experts = model == DEMO, model in EXPERTS
        for algorithm in ALGORITHMS if is_demo or has_experts else _OF_EVERY_FAMILY:
            formats = [format for format in SERVED_FORMATS if algorithm not in FORMATS[format].refused]
            if has_experts and algorithm != NO_QUANT:
                formats = [format for format in formats if algorithm in FORMATS[format].experts]
            if not is_demo:  # a refusal is one of the algorithm, and what is not quantized the same in both formats
                formats = [format for format in formats if (algorithm, format) not in REFUSED]
                formats = formats[:1] if algorithm == NO_QUANT else formats
            quantized_cache = algorithm == "fp8" and model not in ONE_PROJECTION
            if is_demo or not quantized_cache:
                yield from (Cell(model, algorithm, format) for format in formats)
            if quantized_cache:
                yield from (Cell(model, algorithm, format, kv_cache=True) for format in formats)


CELLS: Sequence[Cell] = tuple(_cells())
"""All of them, those of one job after each other."""


def _export(directory: Path, cells: Sequence[Cell]) -> None:
    """Writes the exports of some cells; runs on a rank of its own."""
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    sources = {DEMO: CHECKPOINT}
    for (model, algorithm, kv_cache), its in groupby(cells, lambda cell: (cell.model, cell.algorithm, cell.kv_cache)):
        if model not in sources:
            sources[model] = make_hf(model, directory / model / "source")
        quantization = QuantizationConfig(
            algorithm,
            quality=None if model == DEMO else FAST,
            enable_kv_cache=kv_cache,
            calibration_dataset=str(CALIBRATION),
            calibration_dataset_size=32,
            calibration_batch_size=8,
            calibration_seq_len=64,
            evaluation_dataset_size=0,
        )
        formats = {cell.format: directory / cell.path for cell in its}
        job = check_job(
            world_size=1,
            nemo_checkpoint=str(sources[model]),
            quantization_config=quantization,
            export_config=ExportConfig(str(next(iter(formats.values())).parent), export_format=list(formats)),
        )
        run_job(job)


@cache
def _texts(directory: Path, model: str) -> list[list[int]]:
    """Token ids: for the demo model of documents that it was neither trained nor calibrated on, else random ones.

    Args:
        directory: What has the demo model's tokenizer.
        model: The demo, or a tiny model.
    """
    import torch

    from nemo_ptq.engine.documents import load_documents

    if model != DEMO:
        generator = torch.Generator().manual_seed(7)
        tokens: list[list[int]] = torch.randint(0, VOCABULARY, (TEXTS, RANDOM_TOKENS), generator=generator).tolist()
        return tokens
    found = load_documents(directory, HELDOUT, TOKENS, 4 * TEXTS)
    return [text[0].tolist() for text in found.tokens if text.shape[1] == TOKENS][:TEXTS]


def _request(directory: Path, cell: Cell) -> dict[str, object]:
    """What a server is asked about an export, and what our reader answers."""
    import torch

    from nemo_ptq.verify.forward_pass import logits

    texts = _texts(directory / DEMO / NO_QUANT / "hf", cell.model)
    tokens = torch.tensor(texts)
    predicted = logits(directory / cell.path, tokens).float().log_softmax(-1)[:, :-1]
    chosen = predicted.gather(-1, tokens[:, 1:, None])[..., 0]
    return {"directory": cell.path, "tokens": texts, "log_probs": chosen.tolist()}


def make_exports(directory: Path, cells: Sequence[Cell] = CELLS) -> list[dict[str, object]]:
    """Writes exports and `requests.json` into a directory.

    Args:
        directory: Where to; nothing of the exports is there yet.
        cells: Which, those of one job after each other.

    Returns:
        What requests.json holds.
    """
    run_ranks(_export, 1, directory, cells, timeout=3600)
    requests = [_request(directory, cell) for cell in cells]
    (directory / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    return requests


if __name__ == "__main__":
    make_exports(Path(sys.argv[1]))
