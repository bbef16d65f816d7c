# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""What a job may fill follows from what is free, by the tightest limit there is."""

import resource
from pathlib import Path

import pytest
import torch

from nemo_ptq.parallel import machine_memory
from nemo_ptq.parallel.machine_memory import free_memory, usable_memory

CPU = torch.device("cpu")


def test_what_is_free_is_less_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (total,) = (int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal:" in line)
    assert 0 < free_memory(CPU) < total * 1024


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_memory, "_machine", lambda: 800)
    monkeypatch.setattr(machine_memory, "_cgroup", lambda: [])
    monkeypatch.setattr(machine_memory, "_process", lambda: 10_000)
    for ranks, free in ((1, 800), (4, 200)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert free_memory(CPU) == free


@pytest.mark.parametrize(
    ("machine", "cgroup", "process", "free"), [(9, [], 99, 9), (9, [5], 99, 5), (9, [50], 99, 9), (9, [5], 3, 3)]
)
def test_the_tightest_limit_counts(
    machine: int, cgroup: list[int], process: int, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(machine_memory, "_machine", lambda: machine)
    monkeypatch.setattr(machine_memory, "_cgroup", lambda: cgroup)
    monkeypatch.setattr(machine_memory, "_process", lambda: process)
    assert free_memory(CPU) == free


def test_something_is_left_for_the_gaps_of_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_memory, "free_memory", lambda _: 1000)
    assert usable_memory(CPU) == 900


def test_a_limit_of_the_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (mapped + (1 << 30), resource.RLIM_INFINITY))
    # What is mapped may grow a little between the two looks.
    assert (1 << 29) < machine_memory._process() <= (1 << 31)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (mapped // 2, resource.RLIM_INFINITY))
    assert machine_memory._process() == 0
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert machine_memory._process() > 1 << 60


def test_a_limit_of_private_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    limits = {resource.RLIMIT_DATA: (int(line.split()[1]) * 1024 + (1 << 30), resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda limit: limits.get(limit, unlimited))
    assert (1 << 29) < machine_memory._process() <= (1 << 31)
