# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Run by a Python that has vLLM, and nothing else of this project: loads exports and scores texts with each.

    python ask_vllm.py EXPORTS ANSWERS [--cpu] [--share I/N] [--tensor-parallel N] [PATH...]

EXPORTS holds exports and `requests.json`, as tests/serve/exports.py makes them; PATH names some of them, by their
directories below EXPORTS. ANSWERS gets a file of each: the log probabilities of the second and following tokens of its
texts, or the error with which vLLM refused it. An export that has an answer is not asked again. With --share one of N
processes takes its part of them. With --cpu each is served in the data type that its request names for that, and torch
computes what vLLM's CPU build has no kernels for; loading stays vLLM's own.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def score(directory: Path, tokens: list[list[int]], length: int | None, **settings: Any) -> list[list[float]]:
    """Loads a directory and returns the log probability of each token but the first of each text."""
    llm = LLM(
        model=str(directory),
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=128 * 2**20,
        gpu_memory_utilization=0.02,
        enable_prefix_caching=False,
        **settings,
    )
    try:
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        results = llm.generate([{"prompt_token_ids": text} for text in tokens], wanted, use_tqdm=False)
        pairs = [zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True) for found in results]
        return [[among[token].logprob for token, among in text] for text in pairs]
    finally:
        llm.llm_engine.engine_core.shutdown()


def answer(request: dict[str, Any], exports: Path, **settings: Any) -> dict[str, Any]:
    """Returns an export's log probabilities, or vLLM's error."""
    found: dict[str, Any] = {"directory": request["directory"], "vllm": vllm.__version__}
    try:
        found["log_probs"] = score(exports / request["directory"], request["tokens"], request["length"], **settings)
    except Exception as error:  # that it is refused is an answer
        found["error"] = f"{type(error).__name__}: {error}"
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def _keep_imports_out_of_collections() -> None:
    """Has collections leave out modules: vLLM collects several times an export, which else takes most of the time."""
    gc.collect()
    gc.freeze()
    for name in ("freeze", "unfreeze"):  # as vLLM itself does between exports
        setattr(gc, name, lambda: None)


def main() -> None:
    """Answers requests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("exports", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    arguments = parser.parse_intermixed_args()
    arguments.answers.mkdir(parents=True, exist_ok=True)
    requests = json.loads((arguments.exports / "requests.json").read_text(encoding="utf-8"))
    asked = [request for request in requests if not arguments.paths or request["directory"] in arguments.paths]
    if arguments.cpu:  # nothing ends the emulation once it has begun
        asked.sort(key=lambda request: bool(request["emulated"]))
    _keep_imports_out_of_collections()
    index, count = map(int, arguments.share.split("/"))
    is_emulating = False
    for request in asked[index::count]:
        file = arguments.answers / f"{request['directory'].replace('/', '.')}.json"
        if file.exists():
            continue
        if arguments.cpu and request["emulated"] and not is_emulating:
            from emulation import emulate

            emulate()
            is_emulating = True
        settings: dict[str, Any] = {"dtype": "bfloat16", "tensor_parallel_size": arguments.tensor_parallel}
        if arguments.cpu:  # where the bytes for the KV cache have no effect, its blocks do
            settings |= {"dtype": request["cpu_dtype"], "num_gpu_blocks_override": 256}
        found = answer(request, arguments.exports, **settings)
        file.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
        file.with_suffix(".part").rename(file)
        print("RESULT", request["directory"], found.get("error", "loaded")[:300], flush=True)
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads would keep the process


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
