# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Plugins as a third party would write them, for tests/test_plugins.py: one file each."""
