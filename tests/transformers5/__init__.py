# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Tests with transformers 5, which has an environment of its own: `make tf5-env` installs it."""
