# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The devices that jobs are planned for: their data sheets, in one table."""

import os
from dataclasses import dataclass

from nemo_ptq.errors import ConfigError, did_you_mean

_GIB = 2**30
# Measured rate of bfloat16 multiplications on one core of a server's processor: see docs/benchmarks.md.
_TFLOPS_OF_A_CORE = 0.18


@dataclass(frozen=True)
class Device:
    """The device that one rank runs on.

    Attributes:
        name: What users call it.
        memory: Bytes; for a CPU the machine's memory, which all ranks share.
        bf16_tflops: Dense bfloat16 matrix products, 10^12 operations a second, from the data sheet.
        memory_bandwidth: Bandwidth of its memory, 10^9 bytes a second.
        disk_bandwidth: Bandwidth of the file system that a rank reads and writes, 10^9 bytes a second.
        is_cpu: Whether ranks share the memory, and compute in float32 where a GPU takes bfloat16.
    """

    name: str
    memory: int
    bf16_tflops: float
    memory_bandwidth: float
    disk_bandwidth: float = 2.0
    is_cpu: bool = False

    @property
    def usable(self) -> int:
        """Bytes that a job may fill: all but the share of the driver, NCCL and the allocator's gaps."""
        return int(self.memory * 0.97) - 2 * _GIB


# Memory as the driver reports it.
_GPUS = (
    Device("A100-40", 40 * _GIB, 312.0, 1555.0),
    Device("A100-80", 80 * _GIB, 312.0, 2039.0),
    Device("H100", int(79.6 * _GIB), 989.0, 3350.0),
    Device("H200", int(140.4 * _GIB), 989.0, 4800.0),
    Device("B200", int(179.1 * _GIB), 2250.0, 7700.0),
    Device("L4", int(22.5 * _GIB), 121.0, 300.0),
    Device("L40S", int(45.0 * _GIB), 362.0, 864.0),
    Device("RTX-4090", int(24.0 * _GIB), 165.0, 1008.0),
)
GPUS = {device.name: device for device in _GPUS}
CPU = "CPU"


def this_cpu() -> Device:
    """This machine's processor and memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = os.cpu_count() or 1
    return Device(CPU, memory, _TFLOPS_OF_A_CORE * cores, 20.0 * cores, 0.5, is_cpu=True)


def device_named(name: str, option: str = "device") -> Device:
    """Finds a device by its name, in any case: "H100", "a100-80", "cpu" for this machine.

    Args:
        name: The name.
        option: Where the user gave it, for the error.

    Raises:
        ConfigError: If the table has no such device.
    """
    known = {**{key.lower(): device for key, device in GPUS.items()}, CPU.lower(): this_cpu()}
    if name.lower() not in known:
        names = (*GPUS, CPU)
        hint = did_you_mean(name, {key.lower(): key for key in names})
        raise ConfigError([f"{option}={name} is not known{hint} It must be one of {', '.join(names)}"])
    return known[name.lower()]
