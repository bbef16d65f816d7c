# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Problems of a Hugging Face directory: config.json, its tensors and their values, and the tokenizer."""

from functools import partial

import torch

from nemo_ptq.pretrained import TOKENS_WITHOUT_ROWS, load_pretrained
from nemo_ptq.verify.huggingface.hf_directory import INDEX, HuggingFaceDirectory
from nemo_ptq.verify.side_by_side import side_by_side

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def config_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Problems of config.json, hf_quant_config.json and the model that they describe."""
    problems = []
    model_type, expected = directory.config.get("model_type"), directory.architecture.model_type
    if model_type != expected:
        problems.append(f"architectures is {directory.config['architectures']!r}, model_type {model_type!r}")
    problems += _activation_problems(directory)
    quantization = directory.quantization
    if quantization is not None:
        layers = {name for name, module in directory.modules.items() if module.kind in ("embedding", "linear")}
        problems += [f"{pattern} is excluded and no layer" for pattern in quantization.excluded_patterns.idle(layers)]
        problems += [f"{pattern} is quantized and no layer" for pattern in quantization.way_patterns.idle(layers)]
        if not any(directory.quantized) and quantization.algorithm != "dense":
            problems.append("no linear layer is quantized")
    return problems


def _activation_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Where transformers and vLLM, which look at different settings, would compute different activations."""
    if directory.architecture.model_type != "gemma":
        return []
    transformers, vllm = (directory.config.get(name) for name in ("hidden_act", "hidden_activation"))
    if transformers == vllm == "gelu_pytorch_tanh":
        return []
    return [
        f"hidden_act is {transformers!r}, which transformers reads, and hidden_activation {vllm!r}, which vLLM reads: "
        "both must be 'gelu_pytorch_tanh'"
    ]


def tensor_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Where the files do not hold what config.json promises."""
    unquantized = _DTYPES[directory.model_config.dtype]
    wanted, optional, found = directory.expected, directory.optional, directory.header
    strays = {path.name for path in directory.path.glob("*.safetensors")} - set(directory.files.values())
    problems = [f"{name} is in no index" for name in sorted(strays)]
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} is not expected" for name in sorted(found.keys() - wanted.keys() - optional.keys())]
    if directory.files.keys() != found.keys():
        problems.append(f"{INDEX} lists other tensors than the files hold")
    # Servers have these in float32, and files may.
    states = {
        f"{name}.{weight}"
        for name, module in directory.modules.items()
        if module.kind == "state"
        for weight in module.weights
    }
    for name, (dtype, shape) in {**optional, **wanted}.items():
        if name in states and found.get(name) == ("F32", shape):
            continue
        if name in found and found[name] != (dtype or unquantized, shape):
            problems.append(f"{name} is {found[name]}, expected {(dtype or unquantized, shape)}")
    return problems


def value_problems(directory: HuggingFaceDirectory) -> list[str]:
    """Tensors that are not finite, and scales that are not positive."""
    names = [name for name, (dtype, _) in directory.header.items() if dtype in ("BF16", "F16", "F32", "F8_E4M3")]
    return [problem for problem in side_by_side(partial(_value_problem, directory), names, True) if problem]


def _value_problem(directory: HuggingFaceDirectory, name: str) -> str | None:
    if not directory.has_only_finite(name):
        return f"{name} has values that are not finite"
    if name.endswith(("_scale", "_scale_2")):
        tensor = directory.tensor(name)
        scales = tensor.float()
        if not (scales >= 0 if tensor.dtype == torch.float8_e4m3fn else scales > 0).all():
            return f"{name} has scales that are not positive"
    return None


def tokenizer_problems(directory: HuggingFaceDirectory, text: str = "The quick brown fox") -> list[str]:
    """Problems that keep transformers from using the tokenizer, offline and without code from the directory."""
    tokenizer = load_pretrained(directory.path)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    problems = []
    if tokenizer.decode(tokens).strip() != text:
        problems.append(f"{text!r} becomes {tokenizer.decode(tokens)!r} when encoded and decoded")
    rows = directory.model_config.vocab_size
    if len(tokenizer) - len(TOKENS_WITHOUT_ROWS & tokenizer.get_added_vocab().keys()) > rows:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows")
    return problems
