# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory is free for a rank's weights."""

import os
import resource
from pathlib import Path

import torch

# What weights may take of the memory that is free: activations, statistics and packed layers need the rest.
_SHARE = 0.7


def fits_in_memory(num_bytes: int, device: torch.device) -> bool:
    """Whether a rank's weights fit on its device, with what else a job needs beside them."""
    return num_bytes <= _SHARE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that this rank can still allocate on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(min([_machine(), *_cgroup()]) // ranks, _process())


def _machine() -> int:
    """What the kernel could give to new processes without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup() -> list[int]:
    """What the limit of this process's control group leaves, where there is one."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        directory = Path("/sys/fs/cgroup", group)
        limit = (directory / "memory.max").read_text().strip()
        return [] if limit == "max" else [int(limit) - int((directory / "memory.current").read_text())]
    except (OSError, ValueError):
        return []


def _process() -> int:
    """What this process's own limit of address space leaves (``ulimit -v``)."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 62
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return max(limit - mapped, 0)
