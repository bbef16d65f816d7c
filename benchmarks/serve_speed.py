# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How fast vLLM serves a model of Llama-3-8B's shape that is quantized as an export is.

    python benchmarks/serve_speed.py EXPORTS RESULTS PATH

The quantization is that of the export EXPORTS/PATH, of a model of the Llama kind; the weights are random. RESULTS gets
one file: output tokens per second at batch sizes 1 and 64, with prompts of 512 tokens and answers of 128. Needs vLLM,
and nothing of nemo_ptq. Several may run at once: while one measures, no other loads or measures.
"""

import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1"}

import vllm
from vllm import LLM, SamplingParams

LLAMA3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
PROMPT, ANSWER, BATCHES, REPEATS = 512, 128, (1, 64), 3


def write_model(export: Path, directory: Path) -> None:
    """Writes what vLLM reads of a model before its weights."""
    config = json.loads((export / "config.json").read_text(encoding="utf-8")) | LLAMA3_8B
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


@contextmanager
def locked(file: Path, kind: int) -> Iterator[None]:
    """Holds a lock that other processes take as well: shared (`fcntl.LOCK_SH`) or exclusive (`fcntl.LOCK_EX`)."""
    with file.open("w") as lock:
        fcntl.flock(lock, kind)
        yield


def seconds(llm: LLM, batch: int, first: int) -> float:
    """Time that a batch takes, of prompts that no other call has had."""
    prompts = [
        {"prompt_token_ids": [(first + 7919 * index + position) % 128000 for position in range(PROMPT)]}
        for index in range(batch)
    ]
    wanted = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=0, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, wanted, use_tqdm=False)
    return time.perf_counter() - start


def main(exports: Path, results: Path, path: str) -> None:
    """Measures one."""
    file = results / f"{path.replace('/', '.')}.json"
    if file.exists():
        return
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        with locked(results / "lock", fcntl.LOCK_SH):
            write_model(exports / path, Path(work))
            llm = LLM(
                model=work,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=1024,
                max_num_seqs=max(BATCHES),
                kv_cache_memory_bytes=8 * 2**30,
                gpu_memory_utilization=0.05,
                enable_prefix_caching=False,
                compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
            )
            for batch in BATCHES:
                seconds(llm, batch, 1)
        with locked(results / "lock", fcntl.LOCK_EX):
            found = {
                str(batch): batch * ANSWER / min(seconds(llm, batch, 1000 * repeat) for repeat in range(2, 2 + REPEATS))
                for batch in BATCHES
            }
    file.write_text(json.dumps({"path": path, "vllm": vllm.__version__, "tokens_per_second": found}), encoding="utf-8")
    print(path, found, flush=True)
    os._exit(0)  # vLLM's threads would keep the process


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
