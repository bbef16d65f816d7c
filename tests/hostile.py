# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that would run code, for tests that see that it does not run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_ptq.checkpoint.allowed_names import AllowedNames

NOTHING_TRUSTED = AllowedNames()
Graph = dict[str, Any]


class Pickled:
    """What a pickle makes a directory of when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def copy_of(checkpoint: Path, directory: Path) -> Path:
    """Copies a checkpoint's context, and links its weights."""
    shutil.copytree(checkpoint / "context", directory / "context")
    shutil.copytree(checkpoint / "weights", directory / "weights", copy_function=os.link)
    return directory


def change_graph(checkpoint: Path, change: Callable[[Graph], object]) -> None:
    """Changes io.json."""
    file = checkpoint / "context" / "io.json"
    graph = json.loads(file.read_text())
    change(graph)
    file.write_text(json.dumps(graph))


def pyref(name: str) -> dict[str, Any]:
    """A node that names a function or class."""
    module, _, own = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": own}


def leaf(value: Any) -> dict[str, Any]:
    """A node of a plain value."""
    return {"type": "leaf", "value": value}


def sequence(*values: Any, kind: str = "tuple") -> dict[str, Any]:
    """A node of a list or tuple."""
    items = [[f"Index(index={index})", value] for index, value in enumerate(values)]
    return {"type": pyref(f"builtins.{kind}"), "items": items, "metadata": None}


def call(function: str, kind: str = "fiddle._src.config.Config", **arguments: Any) -> dict[str, Any]:
    """A node that has a function or class called; with fiddle's Partial in place of Config, later."""
    return call_of(pyref(function), kind, **arguments)


def call_of(function: Any, kind: str = "fiddle._src.config.Config", **arguments: Any) -> dict[str, Any]:
    """As :func:`call`, of a function that a node names."""
    items = [[f"Attr(name={name!r})", value] for name, value in arguments.items()]
    return {"type": pyref(kind), "items": items, "metadata": sequence(function, sequence(*arguments))}


def make_file(marker: Path) -> dict[str, Any]:
    """A node that makes a file when it is built."""
    return call("subprocess.getoutput", cmd=leaf(f"touch {marker}"))


def node(graph: Graph, prefix: str) -> Graph:
    """The configuration whose key begins with a prefix, such as "llama_model"."""
    return next(value for key, value in graph["objects"].items() if key.startswith(prefix))


def with_argument(graph: Graph, prefix: str, name: str, value: Any) -> None:
    """Gives a configuration one more argument, or another value for one that it has."""
    target = node(graph, prefix)
    for item in target["items"]:
        if item[0] == f"Attr(name={name!r})":
            item[1] = value
            return
    target["items"].append([f"Attr(name={name!r})", value])
    metadata = graph["objects"][target["metadata"]["key"]]
    graph["objects"][metadata["items"][1][1]["key"]]["items"].append(["Index(index=99)", name])
