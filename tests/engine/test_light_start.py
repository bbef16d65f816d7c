# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A job of one of our own algorithms imports neither NeMo nor ModelOpt, nor what compiles code where it runs."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Demo

JOB = """
import sys
from contextlib import suppress
from nemo_ptq.cli.app import main
words = sys.argv[1:]
try:
    while words:
        end = words.index("then")
        sys.argv[1:], words = words[:end], words[end + 1 :]
        with suppress(SystemExit):
            main()
finally:
    heavy = {"nemo", "lightning", "modelopt", "fiddle", "nemo_run", "torch._dynamo", "torch._inductor", "wandb"}
    heavy |= {"setuptools", "sympy", "tensorboard", "torch.distributed.checkpoint", "torch.distributed.tensor"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""


def test_a_job_imports_neither_nemo_nor_modelopt(demo: Demo, tmp_path: Path) -> None:
    settings = {"algorithm": "fp8", "calibration_dataset": demo.calibration, "calibration_dataset_size": 4}
    words: list[str] = []
    jobs = {"nemo": (demo.checkpoint, "balanced"), "hf": (demo.hf, "fast")}
    for kind, (checkpoint, quality) in jobs.items():
        words += [
            "run",
            f"nemo_checkpoint={checkpoint}",
            f"export_config.path={tmp_path / kind}",
            "export_config.export_format=hf",
            *(f"quantization_config.{name}={value}" for name, value in settings.items()),
            "quantization_config.calibration_seq_len=32",
            f"quantization_config.quality={quality}",
            "then",
        ]
    done = subprocess.run(
        [sys.executable, "-c", JOB, *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for kind in jobs:
        assert (tmp_path / kind / "model.safetensors").is_file(), done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"
