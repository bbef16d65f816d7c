# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`nemo-ptq evaluate` on a directory of a billion parameters, with a baseline, in less than 3 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_ptq.verify.trtllm.expected_tensors import rank_tensors
from nemo_ptq.verify.trtllm.trtllm_reader import open_checkpoint

from .conftest import Pristine
from .qnemo_writer import Recipe

# Llama 3.2 1B, its embedding not shared.
SIZES = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_size": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
LIMIT = 3e9
# A process's own account of its peak: what the system says of a child's begins with the peak of the parent.
PROGRAM = """
import sys
from nemo_ptq.cli.app import main
try:
    main()
finally:
    (peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    print(peak, file=sys.stderr)
"""


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Small weights, and scales of one hundredth."""
    if len(shape) < 2:
        return torch.full(shape, 1.0 if dtype == "BF16" else 0.01, dtype=DTYPES[dtype])
    block = torch.randn(1024, shape[1]) * (0.02 if dtype == "BF16" else 2.0)
    return block.repeat(-(-shape[0] // 1024), 1)[: shape[0]].to(DTYPES[dtype])


def enlarge(source: Path, directory: Path) -> Path:
    """Writes a directory of the large sizes after the example of a small one."""
    subprocess.run(["cp", "-r", source, directory], check=True)
    config = json.loads((directory / "config.json").read_text()) | SIZES
    (directory / "config.json").write_text(json.dumps(config))
    specs = rank_tensors(open_checkpoint(directory).config, 0)
    tensors = {name: random_tensor(spec.dtype, spec.shape) for name, spec in specs.items() if not spec.optional}
    (directory / "rank0.safetensors").unlink()
    save_file(tensors, directory / "rank0.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_billion_parameters_stay_under_three_gigabytes(pristine: Pristine, tmp_path: Path) -> None:
    recipes = {"fp8": Recipe("fp8", kv_cache="FP8", dtype="bfloat16"), "no_quant": Recipe(dtype="bfloat16")}
    quantized, baseline = (enlarge(pristine("llama3", recipe), tmp_path / name) for name, recipe in recipes.items())
    text = tmp_path / "text.txt"
    text.write_text("Thequickbrownfoxjumpsoverthelazydog." * 60 + "\n" + "Andthedogdoesnotmind." * 20 + "\n")
    command = [
        "evaluate",
        str(quantized),
        "--baseline",
        str(baseline),
        "--text",
        str(text),
        "--json",
        "--seq-len",
        "256",
        "--sample",
        "1",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["tokens"] == 255 + 255
    peak = int(ended.stderr.split("VmHWM:")[1].split()[0]) * 1024
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < LIMIT
