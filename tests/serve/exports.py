# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the exports that servers are tried with, and what our reader predicts of each (`make serve-exports`).

    python -m tests.serve.exports DIRECTORY

DIRECTORY gets an export in each `CELLS`' path, and `requests.json`: a list of objects with "directory" (the export's
path below DIRECTORY), "tokens" (texts of token ids), "log_probs" (what our reader gives the second and following tokens
of each text), "length" (the longest text that it is served for, null for what the server chooses) and, of a server on a
CPU, "cpu_dtype" and whether it is "emulated". A machine that has a server needs nothing else of this project.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from demo.build import CALIBRATION, CHECKPOINT, HELDOUT, HF
from nemo_ptq.config import AUTO, CUSTOM, FAST, MAX, NO_QUANT, ExportConfig, QuantizationConfig
from nemo_ptq.export.formats import FORMATS
from nemo_ptq.quantization.algorithms import ALGORITHMS
from tests.checkpoint.adapters.test_nemo_adapter import save_adapter
from tests.families import SEED, make_hf
from tests.families import TOKENS as VOCABULARY
from tests.hybrids import make_nemotron_h
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
    "nemotron_h": "Nemotron-H",
}
"""Tiny models of tests/families.py and tests/hybrids.py, and the name of each one's family in the table of servers."""
_LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0 + n / 8 for n in range(16)],
    "long_factor": [3.0 + n for n in range(16)],
}
PHI3_LONG_ROPE: Mapping[str, Mapping[str, Any]] = {
    "phi3_short": {"rope_scaling": _LONG_ROPE, "original_max_position_embeddings": 64},
    "phi3_long": {"rope_scaling": _LONG_ROPE, "original_max_position_embeddings": 32},
}
"""Settings of tiny Phi 3 with longrope, whose texts are within the length of its short factors, and beyond it."""
_OF_EVERY_FAMILY = ("fp8", "int4_awq", "nvfp4", "int8_dynamic", NO_QUANT)
_MIXTURE = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        *(
            {"quantizer_name": f"*self_attention*{kind}_quantizer", "cfg": {"num_bits": [4, 3], "axis": None}}
            for kind in ("weight", "input")
        ),
        *(
            {
                "quantizer_name": f"*linear_fc1*{kind}_quantizer",
                "cfg": {
                    "num_bits": [2, 1],
                    "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]},
                    "axis": None,
                },
            }
            for kind in ("weight", "input")
        ),
    ],
    "algorithm": "max",
}
"""A configuration of ModelOpt's: attention in FP8, the first layers of MLPs in NVFP4, the second unquantized."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "exclude": {"exclude": ["*o_proj*", "first1"]},
    "max": {"quality": MAX},
    "layerwise": {"layerwise": True},
    "int4": {"candidates": ["fp8", "int4_awq", "nvfp4"], "effective_bits": 4.9},
    "adapter": {},
}
"""What an export's job was asked besides its algorithm; that of "adapter" merges one: of a NeMo checkpoint NeMo's."""
_VARIED: Mapping[tuple[str, str], Mapping[str, Sequence[str]]] = {
    (DEMO, "exclude"): {
        "fp8": ("hf", "compressed_tensors"),
        "nvfp4": ("hf", "compressed_tensors"),
        "int4_awq": ("compressed_tensors",),
        "int8_sq": ("compressed_tensors",),
    },
    (DEMO, "max"): {"fp8": ("hf", "compressed_tensors"), "int4_awq": ("compressed_tensors",)},
    (DEMO, "layerwise"): {"nvfp4": ("hf", "compressed_tensors"), "int8_sq": ("compressed_tensors",)},
    (DEMO, "int4"): {AUTO: ("compressed_tensors",)},
    (DEMO, "adapter"): {"int4_awq": ("compressed_tensors",)},
    (DEMO, ""): {AUTO: ("hf", "compressed_tensors"), CUSTOM: ("hf", "compressed_tensors")},
    ("mixtral", ""): {AUTO: ("hf", "compressed_tensors")},
    ("qwen3_moe", ""): {AUTO: ("hf", "compressed_tensors")},
    ("qwen3_moe", "exclude"): {"nvfp4": ("hf", "compressed_tensors")},
    ("nemotron_h", ""): {AUTO: ("hf", "compressed_tensors"), "int8_sq": ("compressed_tensors",)},
    ("llama31", "adapter"): {"int4_awq": ("compressed_tensors",)},
    **{
        (model, ""): {"int8_sq": ("compressed_tensors",)}
        for model in ("mistral", "gemma", "starcoder", "starcoder2", "nemotron")
    },
    ("phi3_short", ""): {NO_QUANT: ("hf",), "fp8": ("hf",)},
    ("phi3_long", ""): {NO_QUANT: ("hf",), "fp8": ("hf",)},
}
"""Formats by algorithm of a model's further jobs."""
TIED = ("llama32", "qwen3", "gemma", "gemma2", "gemma3")
EXPERTS, ONE_PROJECTION = ("mixtral", "qwen3_moe"), ("phi3", "starcoder")
REFUSED = (("int4_awq", "hf"), ("w4a8_awq", "hf"))
"""Algorithms that vLLM refuses in a format."""
OF_TRANSFORMERS = ("starcoder", "starcoder2")
"""Models for which vLLM 0.32 has no class of its own: it takes transformers' and replaces the linear layers."""
SERVED_FORMATS = ("hf", "compressed_tensors")
TEXTS, TOKENS, RANDOM_TOKENS = 6, 160, 48
LENGTH = 256
"""Tokens that a server makes room for, of the texts and more."""
_ROUNDED = ("int4_awq", "nvfp4")
"""Algorithms whose codes of the demo model are those of quality "balanced"; files of "fast" have the same tensors."""
DEMO_JOBS = 4
"""Jobs of the demo model that one process runs after each other."""


@dataclass(frozen=True)
class Cell:
    """An export that a server is tried with.

    Attributes:
        model: "demo", or a tiny model of tests/families.py.
        algorithm: What it is quantized with.
        format: The export's format.
        kv_cache: Whether its KV cache is quantized.
        variant: What else its job was asked, a name of :data:`VARIANTS`.
    """

    model: str
    algorithm: str
    format: str
    kv_cache: bool = False
    variant: str = ""

    @property
    def path(self) -> str:
        """The export's directory."""
        return f"{self.model}/{self.job}/{self.format}"

    @property
    def job(self) -> str:
        """The job of the model that makes it, and its other formats."""
        return "-".join(filter(None, (self.algorithm, "kv" if self.kv_cache else "", self.variant)))

    @property
    def family(self) -> str:
        """Name of the model's family in the table of servers."""
        if self.model in PHI3_LONG_ROPE:
            return FAMILIES["phi3"]
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
        if self.format != "compressed_tensors":
            return False
        # Its INT8 kernel for processors with AMX gives each token its own scale, whatever the files say, and takes no
        # inputs as transformers' classes have them; of experts there is none.
        return {
            "int4_awq": True,
            "int8_sq": self.model == DEMO,
            "int8_dynamic": self.model not in (*EXPERTS, *OF_TRANSFORMERS),
        }.get(self.algorithm, False)

    @property
    def is_emulated(self) -> bool:
        """Whether on a CPU torch computes it, in float32."""
        return not self.runs_on_a_cpu and not self.is_refused


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
            yield from (Cell(model, algorithm, format) for format in formats)
            if algorithm == "fp8" and model not in ONE_PROJECTION:
                yield from (Cell(model, algorithm, format, kv_cache=True) for format in formats)
    for (model, variant), algorithms in _VARIED.items():
        for algorithm, formats in algorithms.items():
            yield from (Cell(model, algorithm, format, variant=variant) for format in formats)


CELLS: Sequence[Cell] = tuple(_cells())
"""All of them, those of one job after each other."""


def _export(directory: Path, cells: Sequence[Cell]) -> list[dict[str, object]]:
    """Writes the exports of some cells of one model, and returns their requests; runs on a rank of its own."""
    from nemo_ptq.engine.run import run_job
    from nemo_ptq.plan.rules import check_job

    model = cells[0].model
    source = CHECKPOINT if model == DEMO else _make_source(model, directory / model / "source")
    for _, grouped in groupby(cells, lambda cell: cell.job):
        its = list(grouped)
        cell = its[0]
        algorithm, settings = cell.algorithm, dict(VARIANTS[cell.variant])
        if algorithm == CUSTOM:
            algorithm = str(directory / "mixture.json")
            Path(algorithm).write_text(json.dumps(_MIXTURE), encoding="utf-8")
        elif algorithm == AUTO:
            settings = {"effective_bits": 6.0} | settings
        if cell.algorithm != AUTO and not (model == DEMO and cell.algorithm in _ROUNDED):
            settings.setdefault("quality", FAST)
        quantization = QuantizationConfig(
            algorithm,
            enable_kv_cache=cell.kv_cache,
            calibration_dataset=str(CALIBRATION),
            calibration_dataset_size=8 if cell.algorithm == AUTO else 32,
            calibration_batch_size=8,
            calibration_seq_len=64,
            evaluation_dataset_size=0,
            **settings,
        )
        adapter = directory / model / "adapter" if cell.variant == "adapter" else None
        if adapter is not None and model != DEMO:
            make_adapter(source, adapter)
        job = check_job(
            world_size=1,
            nemo_checkpoint=str(source),
            adapter=None if adapter is None else str(adapter),
            quantization_config=quantization,
            export_config=ExportConfig(
                str((directory / cell.path).parent), export_format=[its_cell.format for its_cell in its]
            ),
        )
        run_job(job)
    return [_request(directory, cell) for cell in cells]


def _make_source(model: str, directory: Path) -> Path:
    if model == "nemotron_h":
        return make_nemotron_h(directory)
    if model in PHI3_LONG_ROPE:
        return make_hf("phi3", directory, **PHI3_LONG_ROPE[model])
    return make_hf(model, directory)


def make_adapter(base: Path, directory: Path, rank: int = 4) -> None:
    """Writes a LoRA adapter of PEFT's for the query projections of a Hugging Face directory, of random weights."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith("q_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator).mul(0.05)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator).mul(0.05)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


@cache
def _texts(model: str) -> list[list[int]]:
    """Token ids: for the demo model of documents that it was neither trained nor calibrated on, else random ones."""
    import torch

    from nemo_ptq.engine.documents import load_documents

    if model != DEMO:
        generator = torch.Generator().manual_seed(7)
        tokens: list[list[int]] = torch.randint(0, VOCABULARY, (TEXTS, RANDOM_TOKENS), generator=generator).tolist()
        return tokens
    found = load_documents(HF, HELDOUT, TOKENS, 4 * TEXTS)
    return [text[0].tolist() for text in found.tokens if text.shape[1] == TOKENS][:TEXTS]


def _request(directory: Path, cell: Cell) -> dict[str, object]:
    """What a server is asked about an export, and what our reader answers."""
    import torch

    from nemo_ptq.verify.forward_pass import logits

    texts = _texts(cell.model)
    tokens = torch.tensor(texts)
    predicted = logits(directory / cell.path, tokens).float().log_softmax(-1)[:, :-1]
    chosen = predicted.gather(-1, tokens[:, 1:, None])[..., 0]
    return {
        "directory": cell.path,
        "tokens": texts,
        "log_probs": chosen.tolist(),
        "length": None if cell.model == "phi3_short" else LENGTH,
        "cpu_dtype": "float32" if cell.algorithm == NO_QUANT or cell.is_emulated else "bfloat16",
        "emulated": cell.is_emulated,
    }


def _portions(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Parts of like size, none with cells of several models or with a part of a job's."""
    for model, its in groupby(sorted(cells, key=lambda cell: cell.model), lambda cell: cell.model):
        jobs = [list(grouped) for _, grouped in groupby(its, lambda cell: cell.job)]
        size = DEMO_JOBS if model == DEMO else len(jobs)  # the source of another model is made with its first job
        for first in range(0, len(jobs), size):
            yield [cell for job in jobs[first : first + size] for cell in job]


def make_exports(directory: Path, cells: Sequence[Cell] = CELLS) -> list[dict[str, object]]:
    """Writes exports and `requests.json` into a directory, in two processes.

    Args:
        directory: Where to; nothing of the exports is there yet.
        cells: Which, those of one job after each other.

    Returns:
        What requests.json holds.
    """
    if any(cell.model == DEMO and cell.variant == "adapter" for cell in cells):
        run_ranks(save_adapter, 1, CHECKPOINT, directory / DEMO / "adapter", 1, timeout=600)
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda portion: run_ranks(_export, 1, directory, portion, timeout=3600)[0], _portions(cells))
        by_path = {request["directory"]: request for requests in found for request in requests}
    requests = [by_path[cell.path] for cell in cells]
    (directory / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    return requests


if __name__ == "__main__":
    make_exports(Path(sys.argv[1]))
