# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps track of runs: a record of each in its job directory, and trackers that users name. Imports nothing heavy."""
