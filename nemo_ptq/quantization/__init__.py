# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How numbers are rounded, and what a calibrated model is: algorithms, schemes, the calibration state."""
