# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Tests on a real Slurm with two nodes, which cluster.sh makes of one machine: `make test-cluster`."""
