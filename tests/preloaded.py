# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What ranks find imported when they start, everything that a job needs: see tests/ranks.py."""
# ruff: noqa: F401

import gc

import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import megatron.core.models.gpt
import modelopt.torch.export
import nemo.collections.llm
import pytest
import torch.distributed

import nemo_ptq.engine.reexport
import nemo_ptq.engine.run
import nemo_ptq.launch.start
import tests.steps
from nemo_ptq.models.registry import families
from nemo_ptq.report.page import make_environment

families()
for name in make_environment().list_templates():
    make_environment().get_template(name)

# A collection on a rank would look at, and so copy, all that it shares with the process that it was forked from.
gc.collect()
gc.freeze()
