# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration by NVIDIA ModelOpt: configurations and loops of the user's own, and models with its quantizers.

Nothing else imports ModelOpt, which takes many seconds. Our own algorithms do without it; the tests hold their results
against it, bit for bit.
"""
