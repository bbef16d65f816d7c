# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Shows what is in a qnemo directory: `python -m demo.contents DIRECTORY`."""

import json
import sys
from pathlib import Path


def show(directory: Path) -> None:
    """Prints the directory's files with their sizes, and how its config.json describes the quantization."""
    print(f"\n{directory}")
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:12,}  {file.relative_to(directory)}")
    config = json.loads((directory / "config.json").read_text())
    print(f"\nquantization: {json.dumps(config['quantization'], indent=2)}\n")


if __name__ == "__main__":
    show(Path(sys.argv[1]))
