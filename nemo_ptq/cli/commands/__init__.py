# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `nemo-ptq`, one module each. At module level they import nothing heavy."""
