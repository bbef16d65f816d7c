# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m nemo_ptq`: the `nemo-ptq` command, as torchrun starts it."""

from nemo_ptq.safe_path import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()  # before anything else is imported

    from nemo_ptq.cli.app import main

    main()
