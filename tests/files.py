# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What is in a directory, for tests that compare."""

import hashlib
from pathlib import Path


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, in hexadecimal, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
