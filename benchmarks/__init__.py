# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements, and the comparison of exports that go with them. `docs/benchmarks.md` holds their results."""
