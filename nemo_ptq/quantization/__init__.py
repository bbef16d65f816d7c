# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How numbers are rounded, and how a calibrated model is described: algorithms, schemes, the calibration state."""
