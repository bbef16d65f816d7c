# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Run by the Python of vLLM's environment, which has nothing else of this project: loads directories, scores texts.

    python ask_vllm.py REQUEST ANSWER [--emulate]

REQUEST is a JSON object with "directories", "tokens" (texts of token ids) and "dtype". ANSWER gets an object: for each
directory "log_probs", those of the second and following tokens of each text, or "error". With --emulate torch computes
what vLLM's CPU build has no kernels for; loading stays vLLM's own.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def emulate() -> None:
    """Puts torch in the place of the CUDA kernels for FP8 and NVFP4."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.fusion import fused_act_quant
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.platforms.interface import PlatformEnum

    def scaled_fp8_quant(
        input: torch.Tensor,
        scale: torch.Tensor | None = None,
        num_token_padding: int | None = None,
        scale_ub: torch.Tensor | None = None,
        use_per_token_if_dynamic: bool = False,
        output: torch.Tensor | None = None,
        group_shape: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = input.float()
        if scale is None:
            magnitude = values.abs()
            amax = magnitude.amax(-1, keepdim=True) if use_per_token_if_dynamic else magnitude.max().view(1)
            scale = (amax / 448.0).clamp(min=1.0 / (448.0 * 512.0))
        codes = (values / scale.float()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        if output is not None:
            output.copy_(codes)
        return codes if output is None else output, scale

    ops.scaled_fp8_quant = scaled_fp8_quant
    fused_act_quant._FUSED_ACT_QUANT.clear()  # activation and rounding at once: another missing kernel
    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [linear.EmulationNvFp4LinearKernel]
    every = classmethod(lambda cls: [torch.bfloat16, torch.half, torch.float32])
    for config in (modelopt.ModelOptFp8Config, modelopt.ModelOptNvFp4Config, CompressedTensorsConfig):
        config.get_supported_act_dtypes = every


def score(directory: str, tokens: list[list[int]], dtype: str) -> list[list[float]]:
    """Loads a directory and returns the log probability of each token but the first of each text."""
    llm = LLM(
        model=directory,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=128 * 2**20,
        enable_prefix_caching=False,
    )
    try:
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        results = llm.generate([{"prompt_token_ids": text} for text in tokens], wanted, use_tqdm=False)
        pairs = [zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True) for found in results]
        return [[among[token].logprob for token, among in text] for text in pairs]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main(request: Path, answer: Path, emulated: bool) -> None:
    """Answers a request."""
    asked, found = json.loads(request.read_text(encoding="utf-8")), {}
    if emulated:
        emulate()
    for directory in asked["directories"]:
        try:
            found[directory] = {"log_probs": score(directory, asked["tokens"], asked["dtype"])}
        except Exception as error:  # one directory that is refused is an answer
            found[directory] = {"error": f"{type(error).__name__}: {error}"}
        print(directory, "refused" if "error" in found[directory] else "loaded", flush=True)
        answer.write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would keep the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--emulate" in sys.argv[3:])
