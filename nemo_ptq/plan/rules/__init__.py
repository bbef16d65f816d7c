# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Finds every problem of a job that can be known before anything is started, in well under a second.

There is one module of rules for each subject; :mod:`~nemo_ptq.plan.rules.catalogue` lists and applies them. None needs
torch or NeMo: every command imports this.
"""

from nemo_ptq.plan.rules.catalogue import RULES, Rule, findings
from nemo_ptq.plan.rules.check import check_job
from nemo_ptq.plan.rules.gathering import Gathered, gather

__all__ = ["RULES", "Gathered", "Rule", "check_job", "findings", "gather"]
