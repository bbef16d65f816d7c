# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside a checkpoint, merged into its weights as these are read."""
