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
from nemo_ptq.cli.app import main
try:
    main()
finally:
    heavy = {"nemo", "lightning", "modelopt", "fiddle", "nemo_run", "torch._dynamo", "torch._inductor", "wandb"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""


def test_a_job_imports_neither_nemo_nor_modelopt(demo: Demo, tmp_path: Path) -> None:
    settings = {"algorithm": "fp8", "calibration_dataset": demo.calibration, "calibration_dataset_size": 4}
    words = [
        f"nemo_checkpoint={demo.checkpoint}",
        f"export_config.path={tmp_path / 'out'}",
        "export_config.export_format=hf",
        *(f"quantization_config.{name}={value}" for name, value in settings.items()),
        "quantization_config.calibration_seq_len=32",
    ]
    done = subprocess.run(
        [sys.executable, "-c", JOB, "run", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "out" / "model.safetensors").is_file(), done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"
