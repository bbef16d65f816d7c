# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Jobs that are killed, told to end, or started twice."""

import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random

from tests.faults.lab import GRACE, PATIENCE, Ended, Lab, Started, Verdict

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# How long a launcher takes, in undisturbed jobs that need not import anything.
_LAUNCH = 8.0


def _wait(started: Started, seconds: float) -> None:
    while started.runs() and started.seconds < seconds:
        time.sleep(0.01)


def killed_job(lab: Lab, place: Path, random: Random) -> Verdict:
    """Kill -9 at any moment: nothing looks finished, and the same command goes on, or begins again."""
    output = place / "out"
    words = [*lab.job(output), random.choice(("--layerwise", "--resident"))]
    started, moment = lab.start("script", *words), random.uniform(0, lab.seconds)
    _wait(started, moment)
    started.signal(signal.SIGKILL)
    first = started.wait(GRACE)
    fault = f"{words[-1]} killed after {moment:.1f} s"
    if first.status == 0:
        return lab.judge(f"{fault}, when it had ended", first, output)
    if output.exists():  # killed between the rename and its end
        return Verdict(fault, "unharmed", [] if lab.results(output) == lab.expected else ["what is there differs"])
    again = lab.run("script", *words, "--resume")
    verdict = lab.judge(fault, again, output)
    problems = [*verdict.problems, *([f"did not go on: {again.last_line}"] if again.status else [])]
    return Verdict(fault, "resumed", [*problems, *lab.leftover_problems(output)])


def _ended(
    lab: Lab,
    fault: str,
    started: Started,
    number: int,
    output: Path,
    patience: float,
    expected: Mapping[str, str] | None = None,
) -> Verdict:
    """Judges a command that was told to end."""
    told = started.seconds
    started.signal(number)
    ended = started.wait(patience + lab.seconds)
    fault = f"{fault}, {signal.Signals(number).name} after {told:.1f} s"
    problems = [] if ended.status == -number else ended.problems
    seconds = ended.seconds - told
    if ended.status == 0:
        return lab.judge(f"{fault}, when it had ended", ended, output, expected)
    if seconds > patience:
        problems.append(f"took {seconds:.0f} s to end")
    if number != signal.SIGKILL and ended.status not in (_STATUS[signal.Signals(number)], -number):
        problems.append(f"ended with status {ended.status}: {ended.last_line[:200]}")
    if output.exists() and lab.results(output) != (lab.expected if expected is None else expected):
        problems.append("left what looks like an export")
    return Verdict(f"{fault}: {ended.last_line[:200]}", "ended", [*problems, *_left_running(started, number)])


def _left_running(started: Started, number: int) -> list[str]:
    deadline = time.monotonic() + GRACE
    while started.others() and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"processes {started.others()} are left"] if started.others() else []


def interrupted_job(lab: Lab, place: Path, random: Random) -> Verdict:
    """SIGINT or SIGTERM at any moment of a job: it ends soon, and tidies up or can be resumed."""
    output, number = place / "out", random.choice((signal.SIGINT, signal.SIGTERM))
    started, moment = lab.start("script", *lab.job(output)), random.uniform(0, lab.seconds)
    _wait(started, moment)
    verdict = _ended(lab, "a job", started, number, output, GRACE)
    if verdict.problems or output.exists():
        return verdict
    again = lab.run("script", *lab.job(output), "--resume")
    after = lab.judge(verdict.fault, again, output)
    failed = [f"did not go on: {again.last_line}"] if again.status else []
    return Verdict(verdict.fault, "ended", [*after.problems, *failed, *lab.leftover_problems(output)])


def interrupted_launch(lab: Lab, place: Path, random: Random) -> Verdict:
    """The same to what starts the ranks, as a user's shell does it; all processes end with it."""
    output = place / "out"
    pairs = [word.removeprefix("--") for word in lab.job(output)]
    run = ["nemo-ptq", "run", *map(_as_pair, pairs)]
    script = [sys.executable, "-m", "nemo_ptq.script", *lab.job(output)]
    two = ["torchrun", "--nproc_per_node=2", "-m", "nemo_ptq.script", *lab.job(output), "--calibration_tp=2"]
    way, command = random.choice(
        (
            ("nemo-ptq run", run),
            ("nemo-ptq run, 2 ranks", [*run, "calibration_tp=2"]),
            ("script", script),
            ("torchrun, 2 ranks", two),
            ("nemo-ptq run, NeMo-Run", [*run, "run.executor=torchrun", "calibration_tp=2"]),
        )
    )
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    # torchrun prints a traceback of its own when it is told to end.
    number = signal.SIGKILL if way.startswith("torchrun") else random.choice(numbers)
    expected = lab.expected_of_two if {"--calibration_tp=2", "calibration_tp=2"} & set(command) else None
    started = lab.launch(*command)
    _wait(started, random.uniform(0, _LAUNCH * lab.seconds))
    patience = GRACE if number != signal.SIGKILL else PATIENCE
    verdict = _ended(lab, way, started, number, output, patience, expected)
    left = [entry.name for entry in lab.root.iterdir() if entry.name.startswith("torchelastic_")]
    return Verdict(verdict.fault, verdict.outcome, [*verdict.problems, *(f"left {name}" for name in left)])


_NAMES = {
    "calibration_dataset": "quantization_config.calibration_dataset",
    "calibration_dataset_size": "quantization_config.calibration_dataset_size",
    "batch_size": "quantization_config.calibration_batch_size",
    "seq_len": "quantization_config.calibration_seq_len",
    "evaluation_dataset_size": "quantization_config.evaluation_dataset_size",
    "export_format": "export_config.export_format",
    "export_path": "export_config.path",
}


def _as_pair(word: str) -> str:
    name, _, value = word.partition("=")
    return f"{_NAMES.get(name, name)}={value}"


def pair_of_jobs(lab: Lab, place: Path, random: Random) -> Verdict:
    """Two jobs with one output, the second some time after the first: one makes it, the other is refused."""
    output, delay = place / "out", random.uniform(0, lab.seconds)
    first = lab.start("script", *lab.job(output))
    _wait(first, delay)
    second = lab.start("script", *lab.job(output))
    ends: list[Ended] = [started.wait(2 * lab.seconds + PATIENCE) for started in (first, second)]
    problems = [problem for ended in ends for problem in ended.problems]
    made = [ended for ended in ends if ended.status == 0]
    if len(made) != 1:
        problems.append(f"{len(made)} of two were successful")
    if not output.exists() or lab.results(output) != lab.expected:
        problems.append("what was made differs")
    refused = next((ended.last_line for ended in ends if ended.status), "")
    fault = f"the second after {delay:.1f} s: {refused[:200]}"
    return Verdict(fault, "refused", [*problems, *lab.leftover_problems(output)])
