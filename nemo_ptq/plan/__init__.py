# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job will need, before it starts: memory of each step, sizes of the files, time, and the rules it must keep.

Everything follows from the sizes that a checkpoint's metadata names, so it takes neither torch nor NeMo, no GPU and
no weights. How the figures come about is in docs/plan.md.
"""

from nemo_ptq.plan.planning import Plan, make_plan, plan_job
from nemo_ptq.plan.show import show_plan

__all__ = ["Plan", "make_plan", "plan_job", "show_plan"]
