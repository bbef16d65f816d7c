# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Starts jobs: reads their arguments, checks and plans them, runs them here or through NeMo-Run."""
