# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""nemo_context/: the checkpoint's context, with a tokenizer that travels with it.

A checkpoint may name its tokenizer by a hub id, or the user may have given another one. Readers without NeMo look for
files beside model.yaml, so the tokenizer's files are saved there, and both descriptions of it point at them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from nemo_ptq.checkpoint.megatron.directories import is_megatron
from nemo_ptq.checkpoint.metadata import described_model, is_hugging_face, with_plain_names
from nemo_ptq.checkpoint.tokenizers import transformers_tokenizer
from nemo_ptq.errors import PtqError
from nemo_ptq.untrusted import read_json, read_yaml

TOKENIZER = "nemo_tokenizer"
# Where NeMo's tokenizer classes keep the path of their files.
_PATH_FIELDS = ("pretrained_model_name", "model_path")


def write_context(checkpoint: Path, directory: Path, tokenizer: Any, replaced: bool) -> None:
    """Copies a checkpoint's context, and makes its tokenizer part of it.

    Args:
        checkpoint: The NeMo 2.0 checkpoint, the Hugging Face directory, or Megatron-LM's checkpoint.
        directory: The ``nemo_context`` directory to make.
        tokenizer: NeMo's tokenizer, as it was used, or what has the same ``tokenizer`` of Hugging Face's.
        replaced: Whether it replaces the checkpoint's own.

    Raises:
        PtqError: If the tokenizer's files cannot be saved.
    """
    if is_hugging_face(checkpoint):
        # NeMo describes a model that is none of its own.
        from nemo_ptq.checkpoint.huggingface.importer import HuggingFaceModel

        HuggingFaceModel(checkpoint).write_context(directory)
    elif is_megatron(checkpoint):
        from nemo_ptq.checkpoint.megatron.model import MegatronModel

        MegatronModel(checkpoint).write_context(directory, transformers_tokenizer(tokenizer))
        return
    else:
        _copy(checkpoint / "context", directory)
        if not (directory / "model.yaml").exists():
            (directory / "model.yaml").write_text(yaml.safe_dump(described_model(checkpoint)), encoding="utf-8")
    settings = with_plain_names(read_yaml(directory / "model.yaml").get("tokenizer")) or {}
    field = next((field for field in _PATH_FIELDS if settings.get(field)), None)
    path = settings.get(field) if field else None
    if field and path and not replaced and not Path(path).is_absolute() and (directory / path).exists():
        return
    field = field or _PATH_FIELDS[0]
    name = _save_tokenizer(tokenizer, directory, field)
    _point_model_yaml_at(directory / "model.yaml", field, str(path), name)
    _point_io_json_at(directory / "io.json", field, name)


def _copy(source: Path, target: Path) -> None:
    """Copies a directory; unlike shutil.copytree it fails as its first file does."""
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            _copy(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def _save_tokenizer(tokenizer: Any, directory: Path, field: str) -> str:
    """Saves the tokenizer's files, and returns their place in the directory."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if field == "pretrained_model_name" and hasattr(inner, "save_pretrained"):
        inner.save_pretrained(directory / TOKENIZER)
        return TOKENIZER
    model = Path(str(getattr(tokenizer, "model_path", "")))
    if field == "model_path" and model.is_file():
        shutil.copy(model, directory / "tokenizer.model")
        return "tokenizer.model"
    raise PtqError(
        f"the files of {type(tokenizer).__name__} cannot be saved into nemo_context/, where the checkpoint describes "
        f"its tokenizer by {field}: give tokenizer_path= a tokenizer of the kind that the checkpoint has"
    )


def _point_model_yaml_at(path: Path, field: str, old: str, new: str) -> None:
    """Changes one entry only: loading and dumping would lose NeMo's own YAML tags."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    is_tokenizer = False
    for index, line in enumerate(lines):
        if not line.startswith(" "):
            is_tokenizer = line.startswith("tokenizer:")
        elif is_tokenizer and line.strip().startswith(f"{field}:"):
            indent = line[: len(line) - len(line.lstrip())]
            lines[index] = f"{indent}{field}: {new}\n"
            # A name that was no path as NeMo saved it has lines of its own below.
            while index + 1 < len(lines) and lines[index + 1].startswith(f"{indent} "):
                del lines[index + 1]
            path.write_text("".join(lines), encoding="utf-8")
            return
    raise PtqError(f"{path}: the tokenizer has no {field} to change from {old} to {new}")


def _point_io_json_at(path: Path, field: str, new: str) -> None:
    graph, place = read_json(path, finite=False), f"<root>.model.tokenizer.{field}"
    objects = graph["objects"]
    # A name that was no path as NeMo saved it is an object of its own.
    wrapped = [key for key, node in objects.items() if place in node.get("paths", ())]
    for node in objects.values():
        for _, value in node.get("items") or []:
            if isinstance(value, dict) and (place in value.get("paths", ()) or value.get("key") in wrapped):
                value.clear()
                value.update(type="leaf", value=new, paths=[place])
    for key in wrapped:
        del objects[key]
    path.write_text(json.dumps(graph), encoding="utf-8")
