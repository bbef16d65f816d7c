# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory becomes a NeMo 2.0 checkpoint, on a CPU and without running code from the directory."""

from nemo_ptq.checkpoint.huggingface.importer import import_hf

__all__ = ["import_hf"]
