# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments that mean nothing, and terminals that take nothing."""

from pathlib import Path
from random import Random

from nemo_ptq.options import OPTIONS
from tests.faults.lab import Lab, Limits, Verdict

_WRONG = (
    *("", " ", "-1", "0.5", "1e400", "nan", "9" * 400, "[1, 2]", "{", "None", "\x1b[31mred", "../../etc", "a b", "\n"),
    *("=", "$(touch marker)", "`touch marker`", "x" * 5000, "\u2028", "\udcff"),
)
# Values of these are names of files and places, which anything may be.
_FREE = ("path", "tokenizer_path", "trust_checkpoint", "forward_loop", "tracking", "plan_only", "plan_device")


def argument(lab: Lab, place: Path, random: Random) -> Verdict:
    """An option whose value it cannot have: nothing is started."""
    output = place / "out"
    name = random.choice(sorted(name for name in OPTIONS if name.rpartition(".")[2] not in _FREE))
    value = random.choice(_WRONG)
    words = ["run", f"nemo_checkpoint={lab.nemo}", f"export_config.path={output}", f"{name}={value}"]
    words.append(f"quantization_config.calibration_dataset={lab.data}")
    # The first of two is taken for a slip as well; what is left out is what the value is for.
    given = [word for word in words if not word.startswith(f"{name}=")] + [f"{name}={value}"]
    ended = lab.run("nemo-ptq", *given, "quantization_config.calibration_dataset_size=8")
    problems = ended.problems
    if ended.status == 0:
        problems += lab_problems(lab, output)
    elif output.exists():
        problems.append("left what looks like an export")
    if (lab.root / "marker").exists():
        problems.append("code was run")
    fault = f"{name}={value[:30]!r}: {ended.last_line[:200]}"
    return Verdict(fault, "unharmed" if ended.status == 0 else "refused", problems)


def lab_problems(lab: Lab, output: Path) -> list[str]:
    """What is wrong with an export that a job has made of arguments that it took."""
    if not output.exists():  # a plan, or help
        return []
    checked = lab.run("nemo-ptq", "verify", output)
    return [f"what it made is {checked.last_line}"] if checked.status else []


def console(lab: Lab, place: Path, random: Random) -> Verdict:
    """Output that cannot be written, or not as it is."""
    output = place / ("out" if random.random() < 0.5 else "\u00fcberall")
    limits = random.choice(
        (
            Limits(stdout="/dev/full"),
            Limits(variables={"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
            Limits(variables={"TERM": "dumb", "COLUMNS": "1"}),
            Limits(variables={"COLUMNS": "0", "NO_COLOR": "1"}),
        )
    )
    ended = lab.run("script", *lab.job(output), limits=limits)
    verdict = lab.judge(f"{limits.stdout or dict(limits.variables)}", ended, output)
    if limits.stdout and output.exists():  # the export is whole, and what could not be printed is told at the end
        return Verdict(verdict.fault, "unharmed", ended.problems + _differences(lab, output))
    return verdict


def _differences(lab: Lab, output: Path) -> list[str]:
    return [] if lab.results(output) == lab.expected else ["the export differs"]
