# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Files that are not what they were: of checkpoints, of exports, of a saved calibration."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from tests.faults.lab import Lab, Verdict

Damage = Callable[[Path, Random], str]
_TEXT = (".json", ".yaml", ".txt", ".jsonl", ".md", ".jinja")
_BYTES = 64


def _cut(file: Path, random: Random) -> str:
    size = random.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f"cut to {size} bytes"


def _emptied(file: Path, random: Random) -> str:
    os.truncate(file, 0)
    return "emptied"


def _longer(file: Path, random: Random) -> str:
    with file.open("ab") as stream:
        stream.write(random.randbytes(random.randrange(1, _BYTES)) + b"\0")
    return "longer"


def _zeroed(file: Path, random: Random) -> str:
    start = random.randrange(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\0" * min(_BYTES, file.stat().st_size - start))
    return f"zeros from byte {start}"


def _flipped(file: Path, random: Random) -> str:
    content = bytearray(file.read_bytes())
    place, bit = random.randrange(len(content)), random.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def _removed(file: Path, random: Random) -> str:
    file.unlink()
    return "removed"


def _pipe(file: Path, random: Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return "a pipe"


def _directory(file: Path, random: Random) -> str:
    file.unlink()
    file.mkdir()
    return "a directory"


def _endless(file: Path, random: Random) -> str:
    file.unlink()
    file.symlink_to("/dev/zero")
    return "a link to /dev/zero"


def _dangling(file: Path, random: Random) -> str:
    file.unlink()
    file.symlink_to("nowhere")
    return "a link to nothing"


_SHAPES: tuple[Damage, ...] = (_cut, _emptied, _longer, _zeroed, _removed, _pipe, _directory, _endless, _dangling)


# What nobody can see: a part of a template is a template as well, and these files need not be there.
_HARMLESS: Mapping[str, tuple[Damage, ...]] = {
    "chat_template.jinja": (_cut, _emptied, _longer, _zeroed, _removed),
    "generation_config.json": (_removed,),
    "special_tokens_map.json": (_removed,),
    "hf_config.json": (_removed,),
}


def _damaged(
    directory: Path,
    random: Random,
    damages: Callable[[Path], tuple[Damage, ...]],
    harmless: Mapping[str, tuple[Damage, ...]] = _HARMLESS,
) -> str:
    """Damages a file below a directory, and says how."""
    file = random.choice(sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size))
    possible = [damage for damage in damages(file) if damage not in harmless.get(file.name, ())]
    done = random.choice(possible)(file, random)
    return f"{file.relative_to(directory)} {done}"


def nemo_file(lab: Lab, place: Path, random: Random) -> Verdict:
    """A NeMo checkpoint, whose files of tensors have checksums: a flipped bit can be seen in them, and not in text."""
    checkpoint, output = lab.copy(lab.nemo, place), place / "out"
    fault = _damaged(
        checkpoint, random, lambda file: (*_SHAPES, _flipped, _flipped) if file.suffix == ".distcp" else _SHAPES
    )
    return lab.judge(fault, lab.run("script", *lab.job(output, checkpoint)), output)


def hugging_face_file(lab: Lab, place: Path, random: Random) -> Verdict:
    """A Hugging Face directory, whose weights have no checksum: zeros in them are weights as well."""
    checkpoint, output = lab.copy(lab.hf, place), place / "out"
    shapes = tuple(damage for damage in _SHAPES if damage is not _zeroed)
    fault = _damaged(checkpoint, random, lambda file: _SHAPES if file.suffix in _TEXT else shapes)
    return lab.judge(fault, lab.run("script", *lab.job(output, checkpoint)), output)


_WRONG = (
    *("null", "true", '"text"', "[]", "{}", "-1", "0", "1e400", "NaN", "-Infinity", "0.3", "[1, 2]", '{"a": 1}'),
    *("9" * 5000, "10" * 9, "[" * 5000 + "]" * 5000, '"\\u0000"', '"' + "x" * 100_000 + '"'),
)
_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "architectures", "model_type", "rms_norm_eps", "rope_theta"),
)


def setting(lab: Lab, place: Path, random: Random) -> Verdict:
    """A value in config.json that the setting cannot have."""
    checkpoint, output = lab.copy(lab.hf, place), place / "out"
    name, value = random.choice(_SETTINGS), random.choice(_WRONG)
    file = checkpoint / "config.json"
    content = json.loads(file.read_text())
    content[name] = "the value"
    file.write_text(json.dumps(content).replace('"the value"', value))
    ended = lab.run("script", *lab.job(output, checkpoint))
    return lab.judge(f"{name}={value[:40]}", ended, output)


def export_file(lab: Lab, place: Path, random: Random) -> Verdict:
    """A file of an export, which `nemo-ptq verify` checks."""
    export = lab.copy(lab.export / random.choice(("trtllm", "hf")), place)
    fault = _damaged(export, random, lambda _: (*_SHAPES, *(_flipped,) * len(_SHAPES)), harmless={})
    ended = lab.run("nemo-ptq", "verify", export)
    problems = ended.problems + (["taken for success"] if ended.status == 0 else [])
    return Verdict(f"{export.name}/{fault}: {ended.last_line[:300]}", "refused", problems)


def saved_calibration(lab: Lab, place: Path, random: Random) -> Verdict:
    """The calibration in an export, and one that was copied out of it."""
    export, output = lab.copy(lab.export / "trtllm", place), place / "out"
    state = export / "ptq/calibration.safetensors"
    if alone := random.random() < 0.5:
        state = Path(shutil.copy(state, place / "state.safetensors"))
    damage = random.choice((*_SHAPES, *(_flipped,) * len(_SHAPES)))
    fault = f"{'a copy' if alone else 'the original'} {damage(state, random)}"
    words = ["export", state if alone else export, output, "--checkpoint", lab.nemo, "--format", "trtllm,hf"]
    return lab.judge(fault, lab.run("nemo-ptq", *words), output)
