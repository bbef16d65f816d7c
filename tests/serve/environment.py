# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where vLLM is, and what its CPU build is told."""

from pathlib import Path

PYTHON = Path(__file__).parents[2] / "build" / "venv-vllm" / "bin" / "python"
"""Has vLLM, and nothing of this project (`make serve-env`)."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
