# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Where faults are injected: small inputs, what becomes of them without a fault, and commands that can be disturbed."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.families import make_nemo
from tests.files import digests
from tests.ranks import CONTEXT, run_ranks

PATIENCE = 30.0
"""Seconds beyond those of an undisturbed job after which a command hangs."""
GRACE = 10.0
"""Seconds in which a command ends that was told to."""

_SHIM = Path(__file__).with_name("failing_write.c")
_SAMPLES = 16
# What differs between two runs on the same inputs: times, and arguments that say how a run was started.
_OF_THE_RUN = re.compile(r"(^|/)ptq/(report\.(json|html)|manifest\.json|README\.md)$")
_LONG_LINE = 2000


@dataclass
class Ended:
    """How a command has ended.

    Attributes:
        status: Its exit status, negative where a signal has ended it; None where it did not end, and was killed.
        output: What it printed, errors included.
        seconds: How long it took.
    """

    status: int | None
    output: str
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What no command may do, however it ends."""
        found = []
        if self.status is None:
            found.append(f"hangs: no end after {self.seconds:.0f} s")
        if "Traceback (most recent call last)" in self.output:
            found.append(f"a traceback that ends with {self.output.strip().splitlines()[-1][:200]!r}")
        if self.status not in (0, None) and not self.output.strip():
            found.append(f"status {self.status} without a word")
        if any(len(line) > _LONG_LINE for line in self.output.splitlines()):
            found.append("a line of more than 2,000 characters")
        return found

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


class Started:
    """A command that runs, with all processes that it has started."""

    def __init__(self, process: Any, log: Path) -> None:
        self._process, self._log, self._start = process, log, time.monotonic()

    @property
    def pid(self) -> int:
        """Of the command, whose processes are a group of that number."""
        return int(self._process.pid)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._start

    def runs(self) -> bool:
        """Whether it has not ended."""
        poll = getattr(self._process, "poll", None)
        return (poll() is None) if poll else bool(self._process.is_alive())

    def signal(self, number: int) -> None:
        """Sends a signal to the command alone."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, patience: float) -> Ended:
        """Waits for its end, and kills it after some seconds."""
        deadline = time.monotonic() + patience
        while self.runs() and time.monotonic() < deadline:
            time.sleep(0.02)
        hangs = self.runs()
        if hangs:
            os.killpg(self.pid, signal.SIGKILL)
        status = self._process.wait() if isinstance(self._process, subprocess.Popen) else self._joined()
        output = self._log.read_text(errors="replace")
        self._log.unlink()
        return Ended(None if hangs else status, output, self.seconds)

    def _joined(self) -> int:
        self._process.join()
        return int(self._process.exitcode)

    def others(self) -> list[int]:
        """Processes of its group that are still there, the command itself apart."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.pid and fields[0] not in "ZX":  # its session
                    found.append(int(entry.name))
        return found


@dataclass(frozen=True)
class Verdict:
    """What came of a fault.

    Attributes:
        fault: What was done.
        outcome: "refused": a line says what is wrong. "unharmed": the result is what it is without the fault.
            "ended": the command has ended as it was told to. "resumed": another run went on to the same result.
        problems: What must not be; none where all is well.
    """

    fault: str
    outcome: str
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Limits:
    """What a command finds in short supply.

    Attributes:
        file_size: Bytes that a file may have; None for any number.
        stdout: Where its output goes in place of the log, such as "/dev/full".
        variables: Environment variables.
    """

    file_size: int | None = None
    stdout: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


def _enter(door: str, words: Sequence[str], log: str, directory: str, limits: Limits) -> None:
    """Runs a command in a process that was forked for it, as its entry point would."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what has not begun ends silently
    os.chdir(directory)
    for number, path in ((1, limits.stdout or log), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), number)
    sys.stdout = open(1, "w", closefd=False, errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="replace", buffering=1)  # noqa: SIM115
    os.environ.update(limits.variables)
    if limits.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
    try:
        status: Any = _DOORS[door](words)
    except SystemExit as end:
        status = end.code
    except BaseException:  # Python would print it as well
        traceback.print_exc()
        status = 1
    sys.exit(status)


def _script(words: Sequence[str]) -> int:
    from nemo_ptq.script import main

    sys.argv = ["nemo_ptq.script", *words]
    return main()


def _nemo_ptq(words: Sequence[str]) -> None:
    from nemo_ptq.cli.app import main

    sys.argv = ["nemo-ptq", *words]
    main()


_DOORS: Mapping[str, Callable[[Sequence[str]], Any]] = {"script": _script, "nemo-ptq": _nemo_ptq}


def _tensors_of(file: Path) -> str:
    """Names, shapes and bytes of a file's tensors; its metadata, which names the checkpoint's place, is left out."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]
    return f"{header} {hashlib.sha256(content[end:]).hexdigest()}"


class Lab:
    """Inputs, and commands that use them.

    Attributes:
        root: Where everything lies.
        nemo: A NeMo checkpoint of two layers.
        hf: The Hugging Face directory that it comes from.
        data: Calibration text.
        export: What a job makes of them: formats trtllm and hf.
        seconds: How long that took.
        has_shim: Whether writes of commands can be made to fail; see `failing_write.c`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nemo, self.hf = root / "inputs/model", root / "inputs/model.hf"
        self.data, self.export = root / "inputs/data.jsonl", root / "export"
        self.seconds = 0.0
        self.has_shim = False
        self._has_run = 0

    def prepare(self) -> None:
        """Makes the inputs, and what becomes of them."""
        (self.root / "inputs").mkdir(parents=True)
        run_ranks(make_nemo, 1, "llama3", self.nemo)
        texts = (f"The {number}th of some texts, which tells of {number * 7} things." for number in range(2 * _SAMPLES))
        self.data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.inputs = digests(self.root / "inputs")
        for _ in range(2):  # the first one waits for imports
            shutil.rmtree(self.export, ignore_errors=True)
            ended = self.start("script", *self.job(self.export)).wait(600)
            if ended.status != 0:
                raise RuntimeError(f"the undisturbed job failed:\n{ended.output}")
        self.seconds = ended.seconds
        self.expected = self.results(self.export)

    @cached_property
    def expected_of_two(self) -> dict[str, str]:
        """What the undisturbed job makes on two ranks, whose sums round differently."""
        output = self.root / "export_of_two"
        script = ["-m", "nemo_ptq.script", *self.job(output), "--calibration_tp=2"]
        ended = self.launch("torchrun", "--nproc_per_node=2", *script).wait(600)
        if ended.status != 0:
            raise RuntimeError(f"the undisturbed job of two ranks failed:\n{ended.output}")
        return self.results(output)

    def preload_shim(self) -> None:
        """Has commands that are forked count their writes. To be called before any process is forked."""
        self.root.mkdir(parents=True, exist_ok=True)
        if shutil.which("cc") is not None:
            shim = self.root / "failing_write.so"
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, _SHIM, "-ldl"], check=True)
            os.environ["LD_PRELOAD"] = str(shim)
            self.has_shim = True

    def job(self, output: Path, checkpoint: Path | None = None, data: Path | None = None) -> list[str]:
        """The script's flags for a small job."""
        return [
            f"--nemo_checkpoint={checkpoint or self.nemo}",
            f"--calibration_dataset={data or self.data}",
            f"--calibration_dataset_size={_SAMPLES}",
            "--batch_size=4",
            "--seq_len=32",
            "--evaluation_dataset_size=2",
            "--export_format=[trtllm, hf]",
            f"--export_path={output}",
        ]

    def start(
        self, door: str, *words: str | Path, limits: Limits | None = None, directory: Path | None = None
    ) -> Started:
        """Starts a command in a forked process that has imported Megatron already.

        Args:
            door: "script" or "nemo-ptq".
            words: Its arguments.
            limits: What it lacks.
            directory: Its working directory.
        """
        descriptor, log = tempfile.mkstemp(dir=self.root, prefix="log")
        os.close(descriptor)
        arguments = (door, list(map(str, words)), log, str(directory or self.root), limits or Limits())
        process = CONTEXT.Process(target=_enter, args=arguments)
        process.start()
        return Started(process, Path(log))

    def launch(self, *command: str | Path, variables: Mapping[str, str] | None = None) -> Started:
        """Starts a command as a user's shell does."""
        descriptor, log = tempfile.mkstemp(dir=self.root, prefix="log")
        environment = {**os.environ, "NEMORUN_HOME": str(self.root / "nemo_run"), **(variables or {})}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=self.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
        os.close(descriptor)
        return Started(process, Path(log))

    def run(self, door: str, *words: str | Path, limits: Limits | None = None) -> Ended:
        """Starts a command and waits for its end."""
        return self.start(door, *words, limits=limits).wait(self.seconds + PATIENCE)

    def place(self) -> Path:
        """A directory of its own for a fault; its name has not been used before."""
        self._has_run += 1
        directory = self.root / f"fault{os.getpid()}-{self._has_run}"
        directory.mkdir()
        return directory

    def copy(self, source: Path, place: Path) -> Path:
        """A copy of an input, to be damaged."""
        return Path(shutil.copytree(source, place / source.name))

    def results(self, output: Path) -> dict[str, str]:
        """Digests of what a job has made, without what differs from run to run."""
        found = {name: digest for name, digest in digests(output).items() if not _OF_THE_RUN.search(name)}
        for name in found:
            if name.endswith("ptq/calibration.safetensors"):
                found[name] = _tensors_of(output / name)
        return found

    def judge(self, fault: str, ended: Ended, output: Path, expected: Mapping[str, str] | None = None) -> Verdict:
        """Judges a job that a fault has met: it made what it makes without the fault, or nothing.

        Args:
            fault: What was done to it.
            ended: How it ended.
            output: Where it was to write.
            expected: What it makes without the fault, if not what the job of one rank does.
        """
        problems, expected = ended.problems, self.expected if expected is None else expected
        if ended.status == 0:
            results = self.results(output)
            different = sorted(
                name for name in results.keys() | expected.keys() if results.get(name) != expected.get(name)
            )
            if different:
                problems.append(f"taken for success, and {', '.join(different[:3])} differ")
            return Verdict(fault, "unharmed", problems)
        if output.exists():
            problems.append("left what looks like an export")
        return Verdict(
            f"{fault}: {ended.last_line[:300]}", "refused", [*problems, *self.leftover_problems(output, ended)]
        )

    def leftover_problems(self, output: Path, ended: Ended | None = None) -> list[str]:
        """What lies beside an output that a command which has tidied up does not leave."""
        # A job that fails when all is calibrated keeps that, and says so.
        keeps = ended is not None and "the calibration is kept in" in ended.output
        beside = (
            entry.name
            for entry in output.parent.iterdir()
            if entry.name != output.name and not (keeps and ".calibration." in entry.name)
        )
        return [f"left {name}" for name in sorted(beside) if output.name in name]

    def inputs_problems(self) -> list[str]:
        """What has happened to the inputs."""
        now = digests(self.root / "inputs")
        changed = sorted(name for name in self.inputs.keys() | now.keys() if self.inputs.get(name) != now.get(name))
        return [f"the input {name} has changed" for name in changed]
