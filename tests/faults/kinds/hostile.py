# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Files that somebody has made to run code, or to keep a job busy."""

import os
import pickle
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.lab import Lab, Verdict
from tests.hostile import Pickled, call, change_graph, leaf

_COMMANDS = (
    ("subprocess.getoutput", "cmd"),
    ("subprocess.check_call", "args"),
    ("os.system", "command"),
    ("os.mkdir", "path"),
    ("pathlib.Path.touch", "self"),
    ("builtins.eval", "source"),
    ("builtins.open", "file"),
    ("shutil.rmtree", "path"),
    ("torch.load", "f"),
    ("runpy.run_path", "path_name"),
    ("importlib.import_module", "name"),
    ("nemo_run.run", "fn_or_script"),
    ("posix.system", "command"),
)


def _marked(marker: Path, verdict: Verdict) -> Verdict:
    problems = [*verdict.problems, *(["code was run"] if marker.exists() else [])]
    return Verdict(verdict.fault, verdict.outcome, problems)


def _doors(lab: Lab, random: Random, checkpoint: Path, output: Path) -> tuple[str, list[str]]:
    """One of the commands that read a checkpoint."""
    return random.choice(
        (
            ("script", lab.job(output, checkpoint)),
            ("nemo-ptq", ["plan", f"nemo_checkpoint={checkpoint}", f"export_config.path={output}"]),
            ("nemo-ptq", ["export", str(lab.export / "trtllm"), str(output), "--checkpoint", str(checkpoint)]),
        )
    )


def code_in_context(lab: Lab, place: Path, random: Random) -> Verdict:
    """A call of something that is no model, anywhere in io.json."""
    checkpoint, output, marker = lab.copy(lab.nemo, place), place / "out", place / "marker"
    function, parameter = random.choice(_COMMANDS)
    argument = f"touch {marker}" if parameter in ("cmd", "args", "command") else str(marker)
    kind = random.choice(("fiddle._src.config.Config", "fiddle._src.partial.Partial"))
    spot: list[str] = []

    def change(graph: dict[str, Any]) -> None:
        nodes = sorted(key for key, node in graph["objects"].items() if node.get("items"))
        key = random.choice(nodes)
        item = random.choice(graph["objects"][key]["items"])
        item[1] = call(function, kind, **{parameter: leaf(argument)})
        spot.append(f"{key} {item[0]}")

    change_graph(checkpoint, change)
    door, words = _doors(lab, random, checkpoint, output)
    ended = lab.run(door, *words)
    fault = f"{function} at {spot[0]}, {door} {words[0].partition('=')[0]}: {ended.last_line[:200]}"
    # What is neither the model's nor the tokenizer's is never looked at, and the job does what it does without it.
    return _marked(marker, Verdict(fault, "unharmed" if ended.status == 0 else "refused", ended.problems))


def pickled_code(lab: Lab, place: Path, random: Random) -> Verdict:
    """A pickle that runs code when it is read, in place of one that a checkpoint has."""
    checkpoint, output, marker = lab.copy(lab.nemo, place), place / "out", place / "marker"
    file = checkpoint / random.choice(("weights/.metadata", "weights/common.pt", "context/io.pkl", "context/model.pkl"))
    if file.name == ".metadata" and random.random() < 0.5:
        index = pickle.loads(file.read_bytes())
        index.planner_data = Pickled(marker)
        file.write_bytes(pickle.dumps(index))
    else:
        file.write_bytes(pickle.dumps(Pickled(marker)))
    door, words = _doors(lab, random, checkpoint, output)
    ended = lab.run(door, *words)
    fault = f"{file.relative_to(checkpoint)}, {door} {words[0].partition('=')[0]}: {ended.last_line[:200]}"
    return _marked(marker, Verdict(fault, "unharmed" if ended.status == 0 else "refused", ended.problems))


_DATA = (
    b"",
    b"\n\n\n",
    b"\xff\xfe\x00",
    b"{",
    b'{"text": ' + b"[" * 100_000,
    b'{"text": ' + b"9" * 10_000 + b"}\n",
    b'{"text": null}\n',
    b'{"text": 5}\n',
    b'{"text": NaN}\n',
    b'{"text": ""}\n' * 100,
    b'{"other": "text"}\n' * 100,
    b'["text"]\n' * 100,
    b'"\\ud800"\n',
    b'{"text": "\\ud800 alone"}\n' * 100,
    b"\0" * 1000,
    b'{"messages": "none"}\n' * 100,
    b'{"messages": [{"role": 7}]}\n' * 100,
    b'{"messages": [{"role": "user"}]}\n' * 100,
    b'{"conversations": [[]]}\n' * 100,
)
_GOOD = (
    '{"text": "ends as on Windows, and is long enough for a sample"}\r\n' * 100,
    "\ufeff" + '{"text": "begins with a byte order mark, and is long enough"}\n' * 100,
    '{"text": "a\\u0000b in the middle of what is long enough for a sample"}\n' * 100,
)


def data_set(lab: Lab, place: Path, random: Random) -> Verdict:
    """Invalid calibration data, or data with harmless oddities."""
    output, data = place / "out", place / f"data.{random.choice(('jsonl', 'json', 'txt'))}"
    kind = random.random()
    if kind < 0.2:
        os.mkfifo(data)
        fault = "a pipe"
    elif kind < 0.3:
        data.symlink_to("/dev/zero")
        fault = "a link to /dev/zero"
    elif kind < 0.4:
        data.symlink_to(data.name)
        fault = "a link to itself"
    else:
        content = random.choice((*_DATA, *(text.encode() for text in _GOOD)))
        data.write_bytes(content)
        fault = repr(content[:50])
    ended = lab.run("script", *lab.job(output, data=data))
    fault = f"{data.name} {fault}: {ended.last_line[:200]}"
    problems = ended.problems
    if ended.status == 0:
        checked = lab.run("nemo-ptq", "verify", output / "trtllm")
        problems += [f"what it made is {checked.last_line}"] if checked.status else []
    elif output.exists():
        problems.append("left what looks like an export")
    return Verdict(fault, "unharmed" if ended.status == 0 else "refused", problems)
