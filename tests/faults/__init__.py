# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""A campaign of injected faults: `python -m tests.faults` (make test-faults).

A kind of fault is a function that does one thing to the files or processes of a job, chosen by a seeded random number
generator, and tells what came of it (`kinds/`). `lab.py` starts the commands and looks at how they end, `campaign.py`
counts, and writes the table of docs/reliability.md.
"""
