# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Reads and writes NeMo 2.0 checkpoints, and makes one from a Hugging Face directory."""
