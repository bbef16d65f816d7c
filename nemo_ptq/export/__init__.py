# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibrated Megatron model -> files, streaming layer by layer between any two parallelisms."""
