# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Disks that take no more, or fail."""

import subprocess
from pathlib import Path
from random import Random

from tests.faults.lab import Lab, Limits, Verdict


def file_limit(lab: Lab, place: Path, random: Random) -> Verdict:
    """No file may grow beyond some bytes, as with `ulimit -f`."""
    output = place / "out"
    largest = max(file.stat().st_size for file in lab.export.rglob("*") if file.is_file())
    size = int(random.choice((random.uniform(1, 20_000), random.uniform(1, 1.2 * largest))))
    ended = lab.run("script", *lab.job(output), limits=Limits(file_size=size))
    return lab.judge(f"files of at most {size} bytes", ended, output)


def full_disk(lab: Lab, place: Path, random: Random) -> Verdict:
    """A file system with room for a part of the export; it takes root to make one."""
    needed = sum(file.stat().st_size for file in lab.export.rglob("*") if file.is_file())
    size = int(random.uniform(4096, 1.5 * needed))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={random.choice((20, 1000))}", "none", str(place)],
        capture_output=True,
    )
    if mounted.returncode:
        return Verdict("no tmpfs can be mounted", "left out")
    try:
        output = place / "out"
        ended = lab.run("script", *lab.job(output))
        return lab.judge(f"{size} bytes free, {needed} needed", ended, output)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def failing_write(lab: Lab, place: Path, random: Random) -> Verdict:
    """The n-th write below the output and those after it fail, for want of space or by an error of the device."""
    if not lab.has_shim:
        return Verdict("no C compiler", "left out")
    output, number = place / "out", random.randrange(1, 200)
    error = random.choice(("ENOSPC", "EIO", "EDQUOT"))
    variables = {"FAULT_BELOW": str(place), "FAULT_WRITE": str(number), "FAULT_ERROR": error}
    ended = lab.run("script", *lab.job(output), limits=Limits(variables=variables))
    return lab.judge(f"write {number} fails with {error}", ended, output)
