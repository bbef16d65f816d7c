# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of this machine that take seconds, since none of the packages is imported.

Each check is a small function that returns findings. A finding of something that does not work has the command that
fixes it.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from nemo_ptq.calibration.datasets import ON_HUB
from nemo_ptq.calibration.hub import cache_directory, in_cache
from nemo_ptq.tracking.runs import nemo_run_home

# The versions of constraints.txt that decide whether a job works.
TESTED = {
    "torch": "2.13.0",
    "nvidia-modelopt": "0.47.0",
    "megatron-core": "0.16.1",
    "nemo-toolkit": "2.7.3",
    "nemo_run": "0.11.1",
    "transformers": "4.57.6",
}
ENTRY_POINT = "nemo_ptq.launch.nemo_cli"
# NeMo's own `nemo llm ptq`, which ours registers after.
_NEMOS_ENTRY_POINT = "nemo.collections.llm"
_PYTHONS = ((3, 10), (3, 12))
_LEAST_FREE_GB = 10
_HUB = ("huggingface.co", 443)
# Seconds that a command or a connection may take to answer.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: Name of the thing checked.
        ok: Whether it works; None if it is absent and not needed.
        detail: Details for the user.
        fix: The command that fixes it, where it does not work.
        needed: Whether jobs need it.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str = ""
    needed: bool = False


def examine(directory: Path) -> list[Finding]:
    """Runs all checks.

    Args:
        directory: Directory for exports.
    """
    examinations: Sequence[Callable[[], Iterator[Finding]]] = (
        _python,
        _packages,
        _gpu,
        _torchrun,
        _nemo_command,
        _slurm,
        lambda: _writable("exports", directory),
        lambda: _writable("NeMo-Run's experiments", nemo_run_home()),
        lambda: _space(directory),
        _datasets,
    )
    return [finding for examination in examinations for finding in examination()]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    least, most = (".".join(map(str, bound)) for bound in _PYTHONS)
    ok = _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]
    yield Finding("Python", ok, f"{version} (needed: {least} to {most})", f"python{most} -m venv .venv", needed=True)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("nemo_ptq") or []
    except metadata.PackageNotFoundError:
        yield Finding("nemo_ptq", False, "not installed", "pip install -e . -c constraints.txt", needed=True)
        lines = []
    parsed = [requirement for requirement in map(Requirement, lines) if requirement.marker is None]
    bounds = {requirement.name.replace("_", "-"): requirement.specifier for requirement in parsed}
    for name, tested in TESTED.items():
        found, specifier = _version(name), bounds.pop(name.replace("_", "-"), None)
        ok = found is not None and (specifier is None or specifier.contains(found, prereleases=True))
        note = "" if found and found.partition("+")[0] == tested else f" (tested: {tested})"
        yield Finding(name, ok, f"{found or 'not installed'}{note}", f"pip install '{name}=={tested}'", needed=True)
    # The other packages get a line only if they are wrong.
    for name, specifier in bounds.items():
        found = _version(name)
        if found is None or not specifier.contains(found, prereleases=True):
            detail = f"{found or 'not installed'} (needed: {specifier or 'any'})"
            yield Finding(name, False, detail, f"pip install '{name}{specifier}'", needed=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _answer(*command: str) -> str | None:
    """Returns what a command prints, None where it is missing, fails or does not answer."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def _gpu() -> Iterator[Finding]:
    listed = _answer("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not listed:
        yield Finding("GPU", None, "none: jobs run on the CPU")
        return
    cuda = _cuda_of_torch()
    gpus = "; ".join(listed.splitlines())
    if cuda is None:
        yield Finding("GPU", False, f"{gpus}, but this torch is for CPUs only", f"pip install torch=={TESTED['torch']}")
    else:
        yield Finding("GPU", True, f"{gpus}; torch for CUDA {cuda}")
    engine = _version("transformer_engine")
    detail = engine or "not installed: torch's own kernels do its work"
    yield Finding("Transformer Engine", True if engine else None, detail)


def _cuda_of_torch() -> str | None:
    torch = util.find_spec("torch")
    if torch is None or torch.origin is None:
        return None
    version = Path(torch.origin).with_name("version.py")
    found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", version.read_text(), re.MULTILINE) if version.is_file() else None
    return found[1] if found else None


def _torchrun() -> Iterator[Finding]:
    found = shutil.which("torchrun")
    beside = Path(sys.executable).parent
    if found is None and (beside / "torchrun").exists():
        detail = f"in {beside}, which is not on PATH: run.executor=torchrun finds it, a shell does not"
        yield Finding("torchrun", False, detail, f'export PATH="{beside}:$PATH"')
    elif found is None:
        yield Finding("torchrun", False, "not installed", f"pip install torch=={TESTED['torch']}", needed=True)
    elif Path(found).parent.resolve() != beside.resolve():
        detail = f"{found} is of another environment than {sys.executable}"
        yield Finding("torchrun", False, detail, f'export PATH="{beside}:$PATH"')
    else:
        yield Finding("torchrun", True, found)


def _nemo_command() -> Iterator[Finding]:
    name, install = "nemo llm ptq", "pip install -e . -c constraints.txt"
    points = [point for point in metadata.entry_points(group="nemo_run.cli") if point.name == "llm"]
    values = {point.value for point in points}
    others = sorted(values - {ENTRY_POINT, _NEMOS_ENTRY_POINT})
    if not shutil.which("nemo"):
        beside = Path(sys.executable).parent
        fix = f'export PATH="{beside}:$PATH"' if (beside / "nemo").exists() else install
        yield Finding(name, False, "the nemo command is not on PATH", fix, needed=True)
    elif ENTRY_POINT not in values:
        detail = f"another's would run: {', '.join(sorted(values)) or 'none'}"
        yield Finding(name, False, detail, install, needed=True)
    elif others:
        detail = f"nemo_ptq's or that of {', '.join(others)}, whichever is loaded last"
        owners = sorted({point.dist.name for point in points if point.value in others and point.dist is not None})
        yield Finding(name, False, detail, f"pip uninstall {' '.join(owners)}")
    else:
        yield Finding(name, True, f"nemo_ptq's, {shutil.which('nemo')}")


def _slurm() -> Iterator[Finding]:
    if not shutil.which("sinfo"):
        yield Finding("Slurm", None, "not on this machine: run.executor=slurm needs a login node")
        return
    partitions = _answer("sinfo", "--noheader", "--format=%P")
    if partitions is None:
        yield Finding(
            "Slurm",
            False,
            "sinfo does not answer: slurmctld is down, or slurm.conf is another cluster's",
            "scontrol ping",
        )
        return
    yield Finding("Slurm", True, f"partitions {', '.join(sorted(set(partitions.split())))}")
    accounting = _answer("sacct", "--noheader", "--allocations", "--format=jobid") is not None
    detail = "sacct answers" if accounting else "sacct does not answer, and the state of ended jobs comes from it"
    yield Finding("Slurm accounting", accounting, detail, "sacctmgr ping")


def _writable(name: str, directory: Path) -> Iterator[Finding]:
    directory = Path(os.path.abspath(os.path.expanduser(directory)))
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    ok = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    variable = "export NEMORUN_HOME=DIR" if directory == nemo_run_home().absolute() else "nemo-ptq doctor DIR"
    yield Finding(name, ok, f"{existing} is {'' if ok else 'not '}writable", variable, needed=True)


def _space(directory: Path) -> Iterator[Finding]:
    directory = Path(os.path.abspath(os.path.expanduser(directory)))
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    yield Finding("disk space", free >= _LEAST_FREE_GB, f"{free:,.0f} GB free in {existing}", "nemo-ptq doctor DIR")


def _datasets() -> Iterator[Finding]:
    cache = cache_directory()
    missing = [name for name, names in ON_HUB.items() if in_cache(names) is None]
    offline = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")]
    if not missing:
        yield Finding("data sets", True, f"{' and '.join(ON_HUB)} are in {cache}")
    elif not offline and _hub_answers():
        yield Finding("data sets", True, f"{_HUB[0]} answers; {' and '.join(missing)} will be downloaded")
    else:
        reason = f"{offline[0]} is set" if offline else f"{_HUB[0]} does not answer"
        detail = f"{' and '.join(missing)} not in {cache}, and {reason}: use the built-in passages, or give a file"
        yield Finding("data sets", False, detail, "nemo llm ptq ... quantization_config.calibration_dataset=builtin")


def _hub_answers() -> bool:
    try:
        with socket.create_connection(_HUB, timeout=_PATIENCE / 2):
            return True
    except OSError:
        return False
