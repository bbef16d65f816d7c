# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Other tools' quantization of a Hugging Face directory, each by its public interface and in a process of its own.

    PYTHON -m benchmarks.other_tools TOOL MODEL TOKENS OUTPUT --algorithm int4_awq

PYTHON is one of an environment that has the tool, which may want other versions than this package: nothing of it is
imported here. TOKENS is a JSON file of calibration samples, lists of tokens of one length. OUTPUT becomes a directory
as the tool writes it, and the file OUTPUT.seconds says how long loading and quantizing took. Settings are the tools'
own defaults, but for what makes the files comparable: the scheme, the size of groups and the samples.
"""

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GROUP_SIZE = 64
"""In-features that share a scale of INT4."""
_BATCH = 8

Samples = Sequence[Sequence[int]]
# Writes what was quantized into a directory.
Save = Callable[[Path], Any]


def auto_round(model: str, samples: Samples, algorithm: str, device: str) -> Save:
    """Intel's AutoRound: learned rounding, 200 steps for each block; writes compressed-tensors."""
    from auto_round import AutoRound

    scheme = {"int4_awq": "W4A16", "nvfp4": "NVFP4"}[algorithm]
    groups = {"group_size": GROUP_SIZE} if algorithm == "int4_awq" else {}
    tool = AutoRound(
        model,
        scheme=scheme,
        dataset=[torch.tensor([sample]) for sample in samples],
        nsamples=len(samples),
        seqlen=len(samples[0]),
        device_map=device,
        **groups,
    )
    tool.quantize()
    return lambda output: tool.save_quantized(str(output), format="llm_compressor")


def _llm_compressor_recipe(algorithm: str) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    targets = ["Linear"]
    if algorithm == "int4_awq":
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)
        scheme = QuantizationScheme(targets=targets, weights=weights)
    elif algorithm == "int8_sq":
        weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor")
        scheme = QuantizationScheme(targets=targets, weights=weights, input_activations=inputs)
    else:
        scheme = preset_name_to_scheme({"fp8": "FP8", "nvfp4": "NVFP4"}[algorithm], targets)
    recipe: list[Any] = [GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    if algorithm == "int8_sq":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.8))  # as in its examples
    return recipe


def llm_compressor(model: str, samples: Samples, algorithm: str, device: str) -> Save:
    """The vLLM project's llm-compressor: GPTQ, before it SmoothQuant for INT8; writes compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
    rows = {"input_ids": [list(sample) for sample in samples], "attention_mask": [[1] * len(samples[0])] * len(samples)}
    oneshot(
        model=loaded,
        processor=model,
        dataset=Dataset.from_dict(rows),
        recipe=_llm_compressor_recipe(algorithm),
        max_seq_length=len(samples[0]),
        num_calibration_samples=len(samples),
    )
    return lambda output: loaded.save_pretrained(output, save_compressed=True)


def gptqmodel(model: str, samples: Samples, algorithm: str, device: str) -> Save:
    """ModelCloud's GPTQModel; writes GPTQ's own format."""
    from gptqmodel import GPTQConfig, GPTQModel

    loaded = GPTQModel.load(model, GPTQConfig(bits=4, group_size=GROUP_SIZE), device=device)
    rows = [{"input_ids": list(sample), "attention_mask": [1] * len(sample)} for sample in samples]
    loaded.quantize(rows, batch_size=_BATCH)
    return lambda output: loaded.save(str(output))


def modelopt(model: str, samples: Samples, algorithm: str, device: str) -> Save:
    """NVIDIA's ModelOpt, its presets: largest magnitudes, and AWQ for INT4; writes its unified format."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
    preset = {"int4_awq": mtq.INT4_AWQ_CFG, "fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}[algorithm]
    config = copy.deepcopy(preset)
    if algorithm == "int4_awq":
        for entry in config["quant_cfg"]:
            if "block_sizes" in (entry.get("cfg") or {}):
                entry["cfg"]["block_sizes"][-1] = GROUP_SIZE

    def run(quantized: Any) -> None:
        with torch.no_grad():
            for batch in torch.tensor(samples).split(_BATCH):
                quantized(batch.to(device))

    mtq.quantize(loaded, config, run)
    return lambda output: export_hf_checkpoint(loaded, export_dir=output)


@dataclass(frozen=True)
class Tool:
    """A tool that quantizes.

    Attributes:
        module: What it is imported as.
        algorithms: Which of our algorithms it has in the same format.
        quantize: From a directory, samples, an algorithm of these and a device to what saves the result.
    """

    module: str
    algorithms: Sequence[str]
    quantize: Callable[[str, Samples, str, str], Save]


TOOLS: Mapping[str, Tool] = {
    "modelopt": Tool("modelopt", ("int4_awq", "fp8", "nvfp4"), modelopt),
    "auto-round": Tool("auto_round", ("int4_awq", "nvfp4"), auto_round),
    "llm-compressor": Tool("llmcompressor", ("int4_awq", "fp8", "nvfp4", "int8_sq"), llm_compressor),
    "gptqmodel": Tool("gptqmodel", ("int4_awq",), gptqmodel),
}
"""By the names of their projects."""


def installed() -> list[str]:
    """Returns which tools this environment has."""
    return [name for name, tool in TOOLS.items() if importlib.util.find_spec(tool.module)]


def main() -> None:
    """Reads the command line, quantizes and saves; without a tool, prints which are installed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS, nargs="?")
    parser.add_argument("model", nargs="?")
    parser.add_argument("tokens", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--algorithm", default="int4_awq")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.tool is None:
        print(json.dumps(installed()))
        return
    samples = json.loads(arguments.tokens.read_text(encoding="utf-8"))
    begun = time.monotonic()
    save = TOOLS[arguments.tool].quantize(arguments.model, samples, arguments.algorithm, arguments.device)
    seconds = time.monotonic() - begun
    save(arguments.output)
    Path(f"{arguments.output}.seconds").write_text(str(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
