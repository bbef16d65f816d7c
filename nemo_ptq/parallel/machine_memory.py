# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory is free for a rank's weights."""

import os
import resource
from pathlib import Path

import torch

# What a job may fill of the memory that is free: allocators do not give back every gap.
_SHARE = 0.9


def usable_memory(device: torch.device) -> int:
    """Returns the bytes of its device's memory that this rank may plan with."""
    return int(_SHARE * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this rank can still allocate on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(min([_machine(), *_cgroup()]) // ranks, _process())


def _machine() -> int:
    """Bytes that the kernel could give to new processes without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup() -> list[int]:
    """Bytes left below the memory limit of this process's control group; empty if there is none."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        directory = Path("/sys/fs/cgroup", group)
        limit = (directory / "memory.max").read_text().strip()
        return [] if limit == "max" else [int(limit) - int((directory / "memory.current").read_text())]
    except (OSError, ValueError):
        return []


def _process() -> int:
    """Bytes left below this process's limits of address space and private memory (``ulimit -v``, ``ulimit -d``)."""
    # In pages: all that is mapped, and the sixth figure of what is private and writable.
    figures = [int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in Path("/proc/self/statm").read_text().split()]
    used = {resource.RLIMIT_AS: figures[0], resource.RLIMIT_DATA: figures[5]}
    limits = {limit: resource.getrlimit(limit)[0] for limit in used}
    left = [limits[limit] - size for limit, size in used.items() if limits[limit] != resource.RLIM_INFINITY]
    return max(min(left, default=1 << 62), 0)
