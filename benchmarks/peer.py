# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's own path on a Hugging Face directory, as a process of its own: `python -m benchmarks.peer MODEL OUT`.

transformers loads the model, ModelOpt calibrates it on the samples that a job of ours would take, and its exporter
writes it. Nothing is checked afterwards. Algorithm "forward" stops after a bare forward pass over the data, which no
calibration can beat.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_ptq.calibration.datasets import read_samples
from nemo_ptq.calibration.tokens import make_batches, tokenize_all
from nemo_ptq.console.stopwatch import Step, Stopwatch

FORWARD = "forward"
PRESETS = {
    "fp8": ("FP8_DEFAULT_CFG", "FP8_KV_CFG"),
    "int4_awq": ("INT4_AWQ_CFG", None),
    "nvfp4": ("NVFP4_DEFAULT_CFG", None),
}
"""By our name of an algorithm, of those that format hf takes: ModelOpt's presets for weights, and for the KV cache."""


def read_batches(tokenizer: Any, dataset: str, samples: int, seq_len: int, batch_size: int) -> list[torch.Tensor]:
    """Returns the batches that a job calibrates on: int64 (batch, sequence) each."""
    texts = read_samples(dataset, samples)
    return make_batches(tokenize_all(SimpleNamespace(tokenizer=tokenizer), texts, seq_len, dataset), batch_size)


def forward_loop(batches: Sequence[torch.Tensor]) -> Callable[[Any], None]:
    """Returns what runs a transformers model over the batches, to the logits."""

    def loop(model: Any) -> None:
        with torch.no_grad():
            for tokens in batches:
                model(tokens.to(model.device), use_cache=False)

    return loop


def preset(algorithm: str, block_size: int | None = None) -> dict[str, Any]:
    """Returns ModelOpt's configuration of an algorithm, with another size of INT4's groups if one is given."""
    import modelopt.torch.quantization as mtq

    weights, kv_cache = PRESETS[algorithm]
    config = copy.deepcopy(getattr(mtq, weights))
    for entry in config["quant_cfg"]:
        if block_size is not None and "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"][-1] = block_size
    if kv_cache is not None:
        config["quant_cfg"] = [*config["quant_cfg"], *getattr(mtq, kv_cache)["quant_cfg"]]
    return config


def run(arguments: argparse.Namespace) -> list[Step]:
    """Runs the path; returns its steps, with the names that a job's report has for them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stopwatch = Stopwatch()

    @contextmanager
    def step(name: str) -> Iterator[None]:
        with stopwatch.measure(name):
            yield
            if device.type == "cuda":
                torch.cuda.synchronize()
        print(f"{name}: {stopwatch.steps[-1].seconds:.1f} s", flush=True)

    with step("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", device_map={"": device}).eval()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    batches = read_batches(tokenizer, arguments.dataset, arguments.samples, arguments.seq_len, arguments.batch_size)
    loop = forward_loop(batches)
    if arguments.algorithm == FORWARD:
        with step("calibrate"):
            loop(model)
        return stopwatch.steps
    import modelopt.torch.quantization as mtq  # many seconds, which the bare forward pass does without
    from modelopt.torch.export import export_hf_checkpoint

    with step("calibrate"):
        mtq.quantize(model, preset(arguments.algorithm, arguments.block_size), loop)
    with step("export"), torch.inference_mode():
        export_hf_checkpoint(model, export_dir=arguments.output)
        tokenizer.save_pretrained(arguments.output)
    return stopwatch.steps


def main() -> None:
    """Reads the command line, runs, and writes the steps to a file as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face directory")
    parser.add_argument("output", type=Path, help="directory to export to")
    parser.add_argument("--algorithm", choices=(*PRESETS, FORWARD), default="fp8")
    parser.add_argument("--dataset", required=True, help="what a job's --calibration_dataset takes")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, help="of INT4's groups, if it is not the preset's")
    parser.add_argument("--steps", type=Path, required=True, help="file for the steps, as JSON")
    arguments = parser.parse_args()
    steps = run(arguments)
    arguments.steps.write_text(json.dumps([asdict(step) for step in steps]), encoding="utf-8")


if __name__ == "__main__":
    main()
