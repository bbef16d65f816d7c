# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The module that the `nemo` command loads: registers `nemo llm ptq` and the executors. Importing it imports NeMo."""

from contextlib import suppress
from inspect import cleandoc

import nemo_run as run

from nemo_ptq.console.quiet import quiet_imports

# NeMo up to 2.7 registers an `llm ptq` of its own when it is imported, and the last one registered wins. Where NeMo
# cannot be imported, it cannot register anything either.
with suppress(Exception), quiet_imports():
    import nemo.collections.llm  # noqa: F401

from nemo_ptq.launch import executors
from nemo_ptq.launch.run_context import PtqRunContext
from nemo_ptq.options import describe_options
from nemo_ptq.plugins import load_plugins
from nemo_ptq.task import ptq

load_plugins()  # which add to what the help lists

# NeMo-Run's help shows a task's own arguments, and leaves out those of its configs.
HELP = (
    f"\n{cleandoc(ptq.__doc__ or '').partition('Args:')[0]}Arguments, as name=value:\n\n{describe_options()}\n\n"
    "Recipes for known models, for --factory: see `nemo-ptq recipes`."
)

run.cli.entrypoint(ptq, namespace="llm", help=HELP, run_ctx_cls=PtqRunContext)
executors.register()
